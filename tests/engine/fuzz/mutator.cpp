// Mutations that know what a message is: a number of a tensor, a message left out or sent twice, a
// graph of one operation as ggml itself builds it and then one number wrong. libFuzzer's own byte
// mutations are one of them.

#include "message.h"
#include "named.h"
#include "one_node.h"

#include <algorithm>
#include <cstddef>
#include <random>

extern "C" size_t LLVMFuzzerMutate(uint8_t * data, size_t size, size_t max_size);

namespace fuzz {

typedef std::vector<Message> Session;

static std::minstd_rand rng;

static uint32_t below(uint32_t n) { return n == 0 ? 0 : rng() % n; }

static const uint64_t INTERESTING[] = {
    0, 1, 2, 3, 4, 7, 8, 16, 31, 32, 33, 63, 64, 127, 128, 255, 256, 4096, 65535, 65536, 1u << 20, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
    1ull << 32, 1ull << 40, 1ull << 62, 0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF,
};

static uint64_t changed(uint64_t value) {
    switch (below(6)) {
        case 0:  return value + 1 + below(8);
        case 1:  return value - 1 - below(8);
        case 2:  return INTERESTING[below(sizeof(INTERESTING) / sizeof(*INTERESTING))];
        case 3:  return value ^ (1ull << below(64));
        case 4:  return below(300);
        default: return value * (2 + below(3));
    }
}

static uint64_t any_address() {
    return ADDRESS_SYMBOL | (uint64_t) below(3) << 40 | (below(2) ? below(4096) * 4 : (uint64_t) changed(0) & ((1ull << 40) - 1));
}

static void mutate_tensor(Tensor & tensor, const Tensor & other) {
    uint32_t number; // of a dimension or parameter
    switch (below(15)) {
        case 0:  tensor.type = below(45); break;
        case 1:
        case 2:  number = below(4); tensor.ne[number] = (uint32_t) changed(tensor.ne[number]); break;
        case 3:
        case 4:  number = below(4); tensor.nb[number] = (uint32_t) changed(tensor.nb[number]); break;
        case 5:  tensor.op = below(103); break;
        case 6:
        case 7:  number = below(16); tensor.op_params[number] = (int32_t) changed(tensor.op_params[number]); break;
        case 8:  tensor.flags ^= 1 << below(6); break;
        case 9:  tensor.src[below(10)] = below(3) ? other.id : changed(other.id); break;
        case 10: tensor.view_src = below(2) ? other.id : 0; break;
        case 11: tensor.data = below(2) ? any_address() : changed(tensor.data); break;
        case 12: tensor.buffer = below(2) ? BUFFER_SYMBOL | below(3) : changed(tensor.buffer); break;
        case 13: { // the shape of another: what two tensors have in common decides most rules
            std::copy(other.ne, other.ne + 4, tensor.ne);
            std::copy(other.nb, other.nb + 4, tensor.nb);
            break;
        }
        default: tensor.use_count = (int32_t) changed(tensor.use_count); tensor.view_offs = changed(tensor.view_offs); break;
    }
}

static void mutate_message(Message & message) {
    const auto places = tensors_of(message);
    if (!places.empty() && below(8) != 0) {
        Tensor tensor, other;
        const size_t at = places[below(places.size())];
        memcpy(&tensor, &message.payload[at], sizeof(tensor));
        memcpy(&other, &message.payload[places[below(places.size())]], sizeof(other));
        mutate_tensor(tensor, other);
        memcpy(&message.payload[at], &tensor, sizeof(tensor));
        return;
    }
    switch (below(6)) {
        case 0:
            message.announced = changed(message.announced);
            break;
        case 1:
            message.payload.resize(below(message.payload.size() + 16));
            message.announced = message.payload.size();
            break;
        case 2:
            message.command = below(3) == 0 ? below(256) : below(2) ? below(COMMANDS + 2) : MESH_HELLO + below(MESH_COMMANDS - MESH_HELLO);
            break;
        default: {
            std::vector<uint8_t> grown = message.payload;
            const size_t size = grown.size();
            grown.resize(size + 16);
            grown.resize(LLVMFuzzerMutate(grown.data(), size, grown.size()));
            message.payload = grown;
            message.announced = grown.size();
        }
    }
}

static Message small_message() {
    static const uint8_t PLAIN[] = { ALLOC_BUFFER, GET_ALIGNMENT, GET_MAX_SIZE, BUFFER_GET_BASE, FREE_BUFFER, BUFFER_CLEAR,
        GET_DEVICE_MEMORY, DEVICE_COUNT, GRAPH_RECOMPUTE, MESH_HELLO, GGUF_INDEX, LOAD_COMMIT, LOAD_STATUS };
    Message message;
    message.command = PLAIN[below(sizeof(PLAIN))];
    const auto put = [&](uint64_t value, size_t size) {
        const uint8_t * first = (const uint8_t *) &value;
        message.payload.insert(message.payload.end(), first, first + size);
    };
    switch (message.command) {
        case ALLOC_BUFFER:      put(0, 4); put(below(4) ? below(1 << 16) : changed(0), 8); break;
        case BUFFER_GET_BASE:
        case FREE_BUFFER:       put(BUFFER_SYMBOL | below(3), 8); break;
        case BUFFER_CLEAR:      put(BUFFER_SYMBOL | below(3), 8); put(below(256), 1); break;
        case DEVICE_COUNT:      break;
        case MESH_HELLO:        put(1, 8); break;
        case GGUF_INDEX:        message.payload.assign(ROOT_BYTES, ROOT_SYMBOL_BYTE); break;
        default:                put(below(8) == 0, 4); break;
    }
    message.announced = message.payload.size();
    return message;
}

static void mutate_session(Session & session) {
    const size_t at = below(session.size());
    switch (below(12)) {
        case 0:
            session.erase(session.begin() + at);
            break;
        case 1:
            session.insert(session.begin() + at, session[below(session.size())]);
            break;
        case 2:
            std::swap(session[at], session[below(session.size())]);
            break;
        case 3:
            session.insert(session.begin() + at + (at == 0), below(2) ? small_message() : small_named_message(rng()));
            break;
        case 4:
        case 5:
        case 6: { // after the HELLO, a whole client of one operation
            session.resize(1);
            auto client = one_node_client(rng());
            if (below(2)) {
                client = named(client, rng());
            }
            session.insert(session.end(), client.begin(), client.end());
            for (uint32_t n = below(3); n > 0; n--) {
                mutate_message(session[1 + below(session.size() - 1)]);
            }
            break;
        }
        default:
            mutate_message(session[at]);
    }
}

static Session parse(const uint8_t * data, size_t size) {
    Session session;
    const std::vector<uint8_t> input(data, data + size);
    Message message;
    for (size_t position = 0; take_message(input, position, message);) {
        session.push_back(message);
    }
    return session;
}

static Message hello() {
    Message message;
    message.command = HELLO;
    message.payload.resize(24);
    message.announced = 24;
    return message;
}

} // namespace fuzz

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t * data, size_t size, size_t max_size, unsigned int seed) {
    using namespace fuzz;
    rng.seed(seed);
    Session session = parse(data, size);
    for (uint32_t n = 1 + below(3); n > 0; n--) {
        if (session.empty()) {
            session.push_back(hello());
        }
        mutate_session(session);
    }
    std::vector<uint8_t> output;
    for (const Message & message : session) {
        const auto bytes = bytes_of(message);
        if (output.size() + bytes.size() > max_size) {
            break;
        }
        output.insert(output.end(), bytes.begin(), bytes.end());
    }
    std::copy(output.begin(), output.end(), data);
    return output.size();
}

extern "C" size_t LLVMFuzzerCustomCrossOver(const uint8_t * a, size_t a_size, const uint8_t * b, size_t b_size, uint8_t * out, size_t max_size, unsigned int seed) {
    using namespace fuzz;
    rng.seed(seed);
    const Session first = parse(a, a_size), second = parse(b, b_size);
    std::vector<uint8_t> output;
    const auto add = [&](const Message & message) {
        const auto bytes = bytes_of(message);
        if (output.size() + bytes.size() <= max_size) {
            output.insert(output.end(), bytes.begin(), bytes.end());
        }
    };
    const size_t cut = below(first.size() + 1);
    std::for_each(first.begin(), first.begin() + cut, add);
    std::for_each(second.begin() + (second.empty() ? 0 : below(second.size())), second.end(), add);
    std::copy(output.begin(), output.end(), out);
    return output.size();
}
