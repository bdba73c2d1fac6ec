#pragma once

// An input of the fuzzer as a list of messages. Numbers that only a running server knows stand as
// symbols: buffer i is BUFFER_SYMBOL | i, byte n of it ADDRESS_SYMBOL | i << 40 | n (both also
// once it was freed), and a root of 32 bytes ROOT_SYMBOL_BYTE the one file's. i counts allocations.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace fuzz {

static const uint64_t BUFFER_SYMBOL    = 0xB0F0ull << 48;
static const uint64_t ADDRESS_SYMBOL   = 0xADD0ull << 48;
static const uint64_t SYMBOL_MASK      = 0xFFFFull << 48;
static const uint8_t  ROOT_SYMBOL_BYTE = 0xAB;
static const size_t   ROOT_BYTES       = 32;

enum Command : uint8_t { // by ggml-rpc.cpp and the patches' README.md
    ALLOC_BUFFER, GET_ALIGNMENT, GET_MAX_SIZE, BUFFER_GET_BASE, FREE_BUFFER, BUFFER_CLEAR, SET_TENSOR, SET_TENSOR_HASH,
    GET_TENSOR, COPY_TENSOR, GRAPH_COMPUTE, GET_DEVICE_MEMORY, INIT_TENSOR, GET_ALLOC_SIZE, HELLO, DEVICE_COUNT,
    GRAPH_RECOMPUTE, MEMSET_TENSOR, COMMANDS,
    MESH_HELLO = 128, GGUF_INDEX, SET_TENSOR_GGUF, LOAD_COMMIT, LOAD_STATUS, ALLOC, CONFIRM, TENSOR, INPUT, GET, GRAPH,
    GRAPH_AGAIN, PUSH, TAKE, MESH_COMMANDS,
    PUSHED = 254, // of an input only: what comes over a connection of its own from the server before this one
};

#pragma pack(push, 1)
struct Tensor { // rpc_tensor of ggml-rpc.cpp
    uint64_t id;
    uint32_t type;
    uint64_t buffer;
    uint32_t ne[4];
    uint32_t nb[4];
    uint32_t op;
    int32_t  op_params[16];
    int32_t  flags;
    uint64_t src[10];
    uint64_t view_src;
    uint64_t view_offs;
    uint64_t data;
    char     name[64];
    int32_t  use_count;
};
#pragma pack(pop)

struct Buffer {
    uint64_t handle;
    uint64_t base;
};

struct Message {
    uint8_t              command = 0;
    uint64_t             announced = 0; // the size it says it has
    std::vector<uint8_t> payload;
};

inline uint32_t number_at(const std::vector<uint8_t> & payload, size_t at) {
    uint32_t value = 0;
    if (at + sizeof(value) <= payload.size()) {
        memcpy(&value, payload.data() + at, sizeof(value));
    }
    return value;
}

// Where the tensors begin in a message.
inline std::vector<size_t> tensors_of(const Message & message) {
    std::vector<size_t> found;
    const auto add = [&](size_t at) {
        if (at + sizeof(Tensor) <= message.payload.size()) {
            found.push_back(at);
        }
    };
    switch (message.command) {
        case SET_TENSOR: case SET_TENSOR_HASH: case GET_TENSOR: case INIT_TENSOR: case MEMSET_TENSOR:
            add(0);
            break;
        case COPY_TENSOR:
            add(0);
            add(sizeof(Tensor));
            break;
        case GET_ALLOC_SIZE:
            for (size_t i = 0; i < 11; i++) {
                add(4 + i * sizeof(Tensor));
            }
            break;
        case SET_TENSOR_GGUF:
            add(4 + ROOT_BYTES + 32);
            break;
        case TENSOR:
            add(4);
            break;
        case GRAPH_COMPUTE:
        case GRAPH: {
            const size_t   head  = message.command == GRAPH ? 8 : 0; // device, slot
            const uint64_t first = head + 12 + 8ull * number_at(message.payload, head + 4);
            const uint64_t count = number_at(message.payload, first - 4);
            for (uint64_t i = 0; i < count && first + (i + 1) * sizeof(Tensor) <= message.payload.size(); i++) {
                add(first + i * sizeof(Tensor));
            }
            break;
        }
        default:
            break;
    }
    return found;
}

inline bool take_message(const std::vector<uint8_t> & input, size_t & position, Message & message) {
    if (position >= input.size()) {
        return false;
    }
    const size_t left = input.size() - position;
    message.command = input[position];
    message.announced = 0;
    message.payload.clear();
    if (left >= 9) {
        memcpy(&message.announced, &input[position + 1], 8);
        const size_t size = message.announced < left - 9 ? (size_t) message.announced : left - 9;
        message.payload.assign(input.begin() + position + 9, input.begin() + position + 9 + size);
        position += 9 + size;
    } else {
        position = input.size();
    }
    return true;
}

inline std::vector<uint8_t> bytes_of(const Message & message) {
    std::vector<uint8_t> bytes(9 + message.payload.size());
    bytes[0] = message.command;
    memcpy(&bytes[1], &message.announced, 8);
    std::copy(message.payload.begin(), message.payload.end(), bytes.begin() + 9);
    return bytes;
}

inline void resolve_number(uint64_t & value, const std::vector<Buffer> & buffers) {
    if ((value & SYMBOL_MASK) == BUFFER_SYMBOL && (value & ~SYMBOL_MASK) < buffers.size()) {
        value = buffers[value & ~SYMBOL_MASK].handle;
    } else if ((value & SYMBOL_MASK) == ADDRESS_SYMBOL && ((value >> 40) & 0xFF) < buffers.size()) {
        value = buffers[(value >> 40) & 0xFF].base + (value & ((1ull << 40) - 1));
    }
}

inline void resolve_at(std::vector<uint8_t> & payload, size_t at, const std::vector<Buffer> & buffers) {
    uint64_t value;
    if (at + sizeof(value) <= payload.size()) {
        memcpy(&value, &payload[at], sizeof(value));
        resolve_number(value, buffers);
        memcpy(&payload[at], &value, sizeof(value));
    }
}

inline void resolve_root(std::vector<uint8_t> & payload, size_t at, const uint8_t * root) {
    static const std::vector<uint8_t> symbol(ROOT_BYTES, ROOT_SYMBOL_BYTE);
    if (at + ROOT_BYTES <= payload.size() && std::equal(symbol.begin(), symbol.end(), payload.begin() + at)) {
        std::copy(root, root + ROOT_BYTES, payload.begin() + at);
    }
}

inline void resolve(Message & message, const std::vector<Buffer> & buffers, const uint8_t * root) {
    for (const size_t at : tensors_of(message)) {
        resolve_at(message.payload, at + offsetof(Tensor, buffer), buffers);
        resolve_at(message.payload, at + offsetof(Tensor, data), buffers);
    }
    if (message.command == BUFFER_GET_BASE || message.command == FREE_BUFFER || message.command == BUFFER_CLEAR) {
        resolve_at(message.payload, 0, buffers);
    }
    if (message.command == ALLOC) { // a name that is the server's own for another
        resolve_at(message.payload, 4, buffers);
    }
    if (message.command == GGUF_INDEX || message.command == SET_TENSOR_GGUF) {
        resolve_root(message.payload, message.command == GGUF_INDEX ? 0 : 4, root);
    }
}

} // namespace fuzz
