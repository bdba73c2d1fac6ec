#include "one_node.h"

#include "ggml-cpp.h"
#include "ggml.h"

#include <algorithm>
#include <cstddef>
#include <random>

namespace fuzz {

static const size_t BUFFER_BYTES = 256 * 1024;

struct Builder {
    ggml_context_ptr ctx;
    std::minstd_rand rng;

    explicit Builder(uint32_t seed) : ctx(ggml_init({ 1 << 20, nullptr, true })), rng(seed) {}

    int64_t any(int64_t low, int64_t high) { return low + (int64_t) (rng() % (uint64_t) (high - low + 1)); }

    template <typename T, size_t N>
    T one_of(const T (&list)[N]) { return list[rng() % N]; }

    ggml_tensor * tensor(enum ggml_type type, int64_t a, int64_t b = 1, int64_t c = 1, int64_t d = 1) {
        return ggml_new_tensor_4d(ctx.get(), type, a, b, c, d);
    }
    ggml_tensor * f32(int64_t a, int64_t b = 1, int64_t c = 1, int64_t d = 1) { return tensor(GGML_TYPE_F32, a, b, c, d); }
    ggml_tensor * i32(int64_t a, int64_t b = 1, int64_t c = 1, int64_t d = 1) { return tensor(GGML_TYPE_I32, a, b, c, d); }

    enum ggml_type weight() {
        static const enum ggml_type TYPES[] = {
            GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0,
            GGML_TYPE_Q2_K, GGML_TYPE_Q3_K, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K, GGML_TYPE_IQ2_XXS, GGML_TYPE_IQ2_XS, GGML_TYPE_IQ3_XXS,
            GGML_TYPE_IQ1_S, GGML_TYPE_IQ4_NL, GGML_TYPE_IQ3_S, GGML_TYPE_IQ2_S, GGML_TYPE_IQ4_XS, GGML_TYPE_IQ1_M, GGML_TYPE_TQ1_0, GGML_TYPE_TQ2_0,
            GGML_TYPE_MXFP4, GGML_TYPE_NVFP4, GGML_TYPE_Q1_0, GGML_TYPE_Q2_0 };
        return one_of(TYPES);
    }
    enum ggml_type cache() {
        static const enum ggml_type TYPES[] = { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL };
        return one_of(TYPES);
    }
    enum ggml_type plain() {
        static const enum ggml_type TYPES[] = { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16 };
        return one_of(TYPES);
    }
    int64_t blocks(enum ggml_type type) { return ggml_blck_size(type) * any(1, 2); }

    ggml_tensor * any_f32() { return f32(any(1, 40), any(1, 5), any(1, 3), any(1, 2)); }

    // A source as models have it: whole, a part of rows, or transposed.
    ggml_tensor * viewed(ggml_tensor * a) {
        switch (any(0, 3)) {
            case 0:  return ggml_view_4d(ctx.get(), a, std::max<int64_t>(1, a->ne[0] / 2), a->ne[1], a->ne[2], a->ne[3], a->nb[1], a->nb[2], a->nb[3], 0);
            case 1:  return ggml_permute(ctx.get(), a, 0, 2, 1, 3);
            case 2:  return ggml_permute(ctx.get(), a, 1, 0, 2, 3);
            default: return a;
        }
    }

    ggml_tensor * elementwise();
    ggml_tensor * rows();
    ggml_tensor * products();
    ggml_tensor * recurrent();
    ggml_tensor * shapes();
};

ggml_tensor * Builder::elementwise() {
    ggml_context * c = ctx.get();
    ggml_tensor * a = any_f32();
    switch (any(0, 13)) {
        case 0:  return ggml_add(c, tensor(plain(), a->ne[0], a->ne[1], a->ne[2], a->ne[3]), f32(a->ne[0], any(0, 1) ? a->ne[1] : 1));
        case 1:  return ggml_mul(c, viewed(a), f32(1));
        case 2:  return ggml_div(c, a, f32(a->ne[0]));
        case 3:  { const int64_t n = any(1, 4); return ggml_add_id(c, f32(8, 2, 3), f32(8, n), i32(2, 3)); }
        case 4:  return ggml_sqr(c, tensor(plain(), 32, 3));
        case 5:  return ggml_unary(c, tensor(plain(), any(1, 40), any(1, 5)), (enum ggml_unary_op) any(0, GGML_UNARY_OP_COUNT - 1));
        case 6:  return ggml_glu(c, tensor(plain(), 2 * any(1, 20), any(1, 5)), (enum ggml_glu_op) any(0, GGML_GLU_OP_COUNT - 1), any(0, 1));
        case 7:  return ggml_swiglu_split(c, a, f32(a->ne[0], a->ne[1], a->ne[2], a->ne[3]));
        case 8:  return ggml_scale_bias(c, a, 0.5f, any(0, 1));
        case 9:  return ggml_clamp(c, a, -1, 1);
        case 10: return ggml_fill(c, a, 1.0f);
        case 11: return ggml_arange(c, 0, any(1, 40), 1);
        case 12: { const auto t = weight(); ggml_tensor * q = tensor(t, blocks(t), 2); return ggml_is_quantized(t) ? ggml_add_cast(c, q, f32(q->ne[0], 2), GGML_TYPE_F32) : ggml_cos(c, a); }
        default: return ggml_xielu(c, a, 1, 1, 1, 1);
    }
}

ggml_tensor * Builder::rows() {
    ggml_context * c = ctx.get();
    ggml_tensor * a = any_f32();
    switch (any(0, 14)) {
        case 0:  return ggml_sum_rows(c, a);
        case 1:  return ggml_mean(c, a);
        case 2:  return ggml_sum(c, a);
        case 3:  return ggml_cumsum(c, a);
        case 4:  return ggml_rms_norm(c, a, 1e-5f);
        case 5:  return ggml_norm(c, viewed(a), 1e-5f);
        case 6:  return ggml_l2_norm(c, a, 1e-5f);
        case 7:  return ggml_group_norm(c, f32(8, 2, 6), any(1, 6), 1e-5f);
        case 8:  return ggml_argmax(c, f32(any(1, 40), any(1, 5)));
        case 9:  return ggml_argsort(c, f32(any(1, 200), any(1, 5)), any(0, 1) ? GGML_SORT_ORDER_ASC : GGML_SORT_ORDER_DESC);
        case 10: return ggml_top_k(c, f32(any(4, 200), any(1, 5)), any(1, 4));
        case 11: { ggml_tensor * m = any(0, 1) ? tensor(any(0, 1) ? GGML_TYPE_F16 : GGML_TYPE_F32, 32, 4) : nullptr; return ggml_soft_max_ext(c, f32(32, 4, 2, 1), m, 0.5f, m && any(0, 1) ? 2.0f : 0.0f); }
        case 12: { const auto t = weight(); return ggml_get_rows(c, tensor(t, blocks(t), any(1, 6)), i32(any(1, 6))); }
        case 13: { const auto t = cache(); const int64_t n = any(1, 4), w = blocks(t); return ggml_set_rows(c, tensor(t, w, 8), f32(w, n), tensor(any(0, 1) ? GGML_TYPE_I64 : GGML_TYPE_I32, n)); }
        default: { const int mode = one_of({ GGML_ROPE_TYPE_NORMAL, GGML_ROPE_TYPE_NEOX, GGML_ROPE_TYPE_MROPE, GGML_ROPE_TYPE_IMROPE, GGML_ROPE_TYPE_VISION });
                   int sections[4] = { 4, 4, 4, 4 };
                   ggml_tensor * x = tensor(any(0, 1) ? GGML_TYPE_F16 : GGML_TYPE_F32, 32, any(1, 3), 3);
                   ggml_tensor * ff = any(0, 1) ? f32(16) : nullptr;
                   return mode == GGML_ROPE_TYPE_NORMAL || mode == GGML_ROPE_TYPE_NEOX ? ggml_rope_ext(c, x, i32(3), ff, any(0, 1) ? 32 : 16, mode, 64, 1e4f, 1, 0, 1, 32, 1)
                       : ggml_rope_multi(c, x, i32(12), ff, 16, sections, mode, 64, 1e4f, 1, 0, 1, 32, 1); }
    }
}

ggml_tensor * Builder::products() {
    ggml_context * c = ctx.get();
    const auto t = weight();
    const int64_t k = blocks(t), n = any(1, 6);
    switch (any(0, 4)) {
        case 0:  return ggml_mul_mat(c, tensor(t, k, any(1, 20), any(1, 2)), f32(k, n, 2));
        case 1:  { ggml_tensor * w = any(0, 1) ? ggml_permute(c, tensor(GGML_TYPE_F16, 32, 3, 2), 0, 2, 1, 3) : ggml_view_2d(c, tensor(GGML_TYPE_F16, 64, 6), 32, 6, 128, 32);
                   return ggml_mul_mat(c, w, tensor(any(0, 1) ? GGML_TYPE_F16 : GGML_TYPE_F32, 32, n, w->ne[2])); }
        case 2:  { const int64_t used = any(1, 3); return ggml_mul_mat_id(c, tensor(t, k, any(1, 20), 4), f32(k, any(0, 1) ? used : 1, n), i32(used, n)); }
        case 3:  { ggml_tensor * r = ggml_mul_mat(c, f32(16, 16), f32(16, n)); ggml_mul_mat_set_hint(r, GGML_HINT_SRC0_IS_HADAMARD); return r; }
        default: { const auto kv = cache(); const int64_t d = blocks(kv), heads = any(1, 2), cells = one_of({ 8, 32, 40, 520 }), tokens = one_of({ 1, 3, 70 });
                   ggml_tensor * m = any(0, 1) ? tensor(GGML_TYPE_F16, cells, tokens) : nullptr;
                   ggml_tensor * r = ggml_flash_attn_ext(c, f32(d, tokens, 2 * heads), tensor(kv, d, cells, heads), tensor(kv, d, cells, heads), m, 0.1f, m && any(0, 1) ? 1.0f : 0.0f, any(0, 1));
                   if (any(0, 1)) { ggml_flash_attn_ext_add_sinks(r, f32(2 * heads)); }
                   return r; }
    }
}

ggml_tensor * Builder::recurrent() {
    ggml_context * c = ctx.get();
    const int64_t S = one_of({ 4, 8, 16, 20, 64 }), H = any(1, 3), seqs = any(1, 2), T = seqs * any(1, 3);
    const auto x = [&] { return f32(S, H, T); };
    ggml_tensor * state = f32(S * S * H, seqs);
    switch (any(0, 9)) {
        case 0:  return ggml_ssm_conv(c, f32(3 + T, 8, seqs), f32(4, 8));
        case 1:  return ggml_ssm_scan(c, f32(S, 4, H, 3), f32(4, H, T, seqs), f32(H, T, seqs), f32(1, H), f32(S, 1, T, seqs), f32(S, 1, T, seqs), i32(seqs), any(1, 2));
        case 2:  return ggml_rwkv_wkv6(c, x(), x(), x(), f32(S, H), x(), state);
        case 3:  return ggml_rwkv_wkv7(c, x(), x(), x(), x(), x(), x(), state);
        case 4:  return ggml_gated_linear_attn(c, x(), x(), x(), x(), state, 0.5f);
        case 5:  { const auto y = [&] { return f32(S, H, T, seqs); }; return ggml_gated_delta_net(c, y(), y(), y(), f32(any(0, 1) ? 1 : S, H, T, seqs), f32(1, H, T, seqs), f32(S, S, H, seqs), any(1, 3)); }
        case 6:  return ggml_solve_tri(c, f32(S, S, H), f32(T, S, H), true, true, false);
        case 7:  return ggml_lightning_indexer(c, f32(S, H, T), f32(S, 1, 8), f32(H, T), tensor(GGML_TYPE_F16, 8, T));
        case 8:  return ggml_dsv4_hc_comb(c, f32(24, T), f32(3), f32(24), 1e-5f, 3);
        default: return ggml_dsv4_hc_post(c, f32(S, T), f32(S, 4, T), f32(4, T), f32(4, 4, T));
    }
}

ggml_tensor * Builder::shapes() {
    ggml_context * c = ctx.get();
    ggml_tensor * a = any_f32();
    switch (any(0, 11)) {
        case 0:  return ggml_cont(c, viewed(a));
        case 1:  { const auto t = cache(); const int64_t w = blocks(t); return ggml_cpy(c, f32(w, 3), tensor(t, w, 3)); }
        case 2:  { const auto t = weight(); return ggml_cast(c, tensor(t, blocks(t), 3), GGML_TYPE_F32); }
        case 3:  return ggml_cast(c, a, any(0, 1) ? GGML_TYPE_I32 : GGML_TYPE_F16);
        case 4:  return ggml_set_1d(c, f32(40), f32(any(1, 20)), 4 * any(0, 20));
        case 5:  return ggml_repeat_4d(c, a, a->ne[0] * any(1, 2), a->ne[1] * 2, a->ne[2], a->ne[3]);
        case 6:  return ggml_concat(c, a, f32(a->ne[0], a->ne[1], any(1, 3), a->ne[3]), 2);
        case 7:  return any(0, 1) ? ggml_pad(c, a, 1, 2, 0, 1) : ggml_pad_circular(c, a, 1, 0, 1, 0);
        case 8:  return ggml_tri(c, f32(8, 8, any(1, 3)), (enum ggml_tri_type) any(0, 3));
        case 9:  return ggml_diag(c, f32(8, 1, 2));
        case 10: return ggml_im2col(c, tensor(GGML_TYPE_F16, 3, 3, 2, 4), f32(9, 7, 2, 2), 1, 1, any(0, 2), 1, 1, 1, true, any(0, 1) ? GGML_TYPE_F16 : GGML_TYPE_F32);
        default: return ggml_pool_2d(c, f32(9, 8, 2), any(0, 1) ? GGML_OP_POOL_AVG : GGML_OP_POOL_MAX, 2, 2, 2, 2, 0, 0);
    }
}

// Every tensor that a node needs, sources first, with a place in buffer 0.
struct Layout {
    std::vector<ggml_tensor *> tensors;
    std::vector<uint64_t> offsets;
    uint64_t end = 0;

    void add(ggml_tensor * tensor) {
        if (tensor == nullptr || std::find(tensors.begin(), tensors.end(), tensor) != tensors.end()) {
            return;
        }
        for (ggml_tensor * source : tensor->src) {
            if (source != tensor) {
                add(source);
            }
        }
        add(tensor->view_src);
        tensors.push_back(tensor);
        offsets.push_back(tensor->view_src ? offset(tensor->view_src) + tensor->view_offs : end);
        if (!tensor->view_src) {
            end += (ggml_nbytes(tensor) + 31) / 32 * 32;
        }
    }

    size_t index(const ggml_tensor * tensor) const { return std::find(tensors.begin(), tensors.end(), tensor) - tensors.begin(); }
    uint64_t offset(const ggml_tensor * tensor) const { return offsets[index(tensor)]; }
    uint64_t id(const ggml_tensor * tensor) const { return tensor ? 1 + index(tensor) : 0; }

    Tensor packed(const ggml_tensor * tensor) const {
        Tensor t = {};
        t.id = id(tensor);
        t.type = tensor->type;
        t.buffer = BUFFER_SYMBOL;
        t.data = ADDRESS_SYMBOL | offset(tensor);
        t.op = tensor->op;
        t.flags = tensor->flags | (tensor->op == GGML_OP_NONE ? 0 : GGML_TENSOR_FLAG_COMPUTE);
        t.view_src = id(tensor->view_src);
        t.view_offs = tensor->view_offs;
        t.use_count = 1;
        memcpy(t.op_params, tensor->op_params, sizeof(t.op_params));
        for (int i = 0; i < 4; i++) {
            t.ne[i] = (uint32_t) tensor->ne[i];
            t.nb[i] = (uint32_t) tensor->nb[i];
        }
        for (int i = 0; i < GGML_MAX_SRC; i++) {
            t.src[i] = id(tensor->src[i]);
        }
        return t;
    }
};

template <typename T>
static void put(Message & message, const T & value) {
    const uint8_t * first = (const uint8_t *) &value;
    message.payload.insert(message.payload.end(), first, first + sizeof(value));
    message.announced = message.payload.size();
}

static Message content(Builder & builder, const Tensor & tensor, const ggml_tensor * described, uint64_t bytes) {
    Message message;
    message.command = SET_TENSOR;
    put(message, tensor);
    put(message, (uint8_t) 0);
    put(message, (uint64_t) 0);
    const bool indexes = described->type == GGML_TYPE_I32 || described->type == GGML_TYPE_I64;
    const int style = (int) builder.any(0, 7); // mostly numbers, sometimes NaN and anything else
    for (uint64_t i = 0; i < bytes / 4; i++) {
        float number = (float) builder.any(-8, 8) / 4;
        if (indexes) {
            put(message, described->type == GGML_TYPE_I64 && i % 2 ? 0 : (int32_t) builder.any(style == 0 ? -1 : 0, style == 0 ? 9 : 0));
        } else if (style < 2) {
            put(message, (uint32_t) builder.rng());
        } else {
            put(message, style == 2 && i % 3 ? 0.0f / (number - number) : number);
        }
    }
    return message;
}

std::vector<Message> one_node_client(uint32_t seed) {
    Builder builder(seed);
    ggml_tensor * (Builder::*const families[])() = { &Builder::elementwise, &Builder::rows, &Builder::products, &Builder::recurrent, &Builder::shapes };
    ggml_tensor * node = (builder.*families[builder.any(0, 4)])();
    if (builder.any(0, 9) == 0 && node->type == GGML_TYPE_F32) { // what the CPU backend computes in one step
        node = ggml_mul(builder.ctx.get(), ggml_rms_norm(builder.ctx.get(), node, 1e-5f), builder.f32(node->ne[0]));
    }
    Layout layout;
    layout.add(node);

    std::vector<Message> client;
    Message buffer;
    buffer.command = ALLOC_BUFFER;
    put(buffer, (uint32_t) 0);
    put(buffer, (uint64_t) std::max<uint64_t>(std::min<uint64_t>(layout.end, BUFFER_BYTES), 64));
    client.push_back(buffer);

    Message graph;
    graph.command = GRAPH_COMPUTE;
    std::vector<uint64_t> nodes;
    for (const ggml_tensor * tensor : layout.tensors) {
        if (tensor->op != GGML_OP_NONE) {
            nodes.push_back(layout.id(tensor));
        } else if (ggml_nbytes(tensor) <= 4096) {
            client.push_back(content(builder, layout.packed(tensor), tensor, ggml_nbytes(tensor)));
        }
    }
    put(graph, (uint32_t) 0);
    put(graph, (uint32_t) nodes.size());
    for (const uint64_t id : nodes) {
        put(graph, id);
    }
    put(graph, (uint32_t) layout.tensors.size());
    for (const ggml_tensor * tensor : layout.tensors) {
        put(graph, layout.packed(tensor));
    }
    client.push_back(graph);

    Message again;
    again.command = GRAPH_RECOMPUTE;
    put(again, (uint32_t) 0);
    client.push_back(again);

    Message result;
    result.command = GET_TENSOR;
    put(result, layout.packed(node));
    put(result, (uint64_t) 0);
    put(result, (uint64_t) ggml_nbytes(node));
    client.push_back(result);
    return client;
}

} // namespace fuzz
