#include "named.h"

#include <random>

namespace fuzz {

enum Coding : uint8_t { EXACT, F16, Q8, CHANGES, REPEATS, KEEP = 0x80 };

static uint64_t address_of(uint64_t buffer) { return (buffer + 1) << 41; }

// Buffer i is named i + 1.
static void name(uint64_t & value) {
    if ((value & SYMBOL_MASK) == BUFFER_SYMBOL) {
        value = (value & ~SYMBOL_MASK) + 1;
    } else if ((value & SYMBOL_MASK) == ADDRESS_SYMBOL) {
        value = address_of((value >> 40) & 0xFF) + (value & ((1ull << 40) - 1));
    }
}

namespace {

class Writer {
public:
    explicit Writer(uint32_t seed) : rng(seed) {}

    void write(Message message) {
        for (const size_t at : tensors_of(message)) {
            name_at(message.payload, at + offsetof(Tensor, buffer));
            name_at(message.payload, at + offsetof(Tensor, data));
        }
        switch (message.command) {
            case ALLOC_BUFFER:    alloc(message); break;
            case SET_TENSOR:      input(message); break;
            case GET_TENSOR:      get(message); break;
            case GRAPH_COMPUTE:   add(GRAPH, slot(), message.payload); break;
            case GRAPH_RECOMPUTE: add(GRAPH_AGAIN, last_slot, {}); break;
            case FREE_BUFFER: case BUFFER_CLEAR: case BUFFER_GET_BASE:
                name_at(message.payload, 0);
                session.push_back(message);
                break;
            default:
                session.push_back(message);
        }
    }

    void data(uint8_t command, uint32_t tensor, uint8_t coding, uint64_t offset, uint64_t size, const std::vector<uint8_t> & rest) {
        std::vector<uint8_t> payload;
        put(payload, tensor);
        put(payload, coding);
        put(payload, offset);
        put(payload, size);
        payload.insert(payload.end(), rest.begin(), rest.end());
        add(command, payload, {});
    }

    void pushed(uint64_t number, uint32_t coding, const std::vector<uint8_t> & bytes) {
        std::vector<uint8_t> payload = { 'm', 'e', 's', 'h', 'p', 's', 'h', '1' };
        put(payload, number);
        put(payload, coding);
        put(payload, (uint64_t) bytes.size());
        payload.insert(payload.end(), bytes.begin(), bytes.end());
        add(PUSHED, payload, {});
    }

    void add(uint8_t command, const std::vector<uint8_t> & head, const std::vector<uint8_t> & rest) {
        Message message;
        message.command = command;
        message.payload = head;
        message.payload.insert(message.payload.end(), rest.begin(), rest.end());
        message.announced = message.payload.size();
        session.push_back(message);
    }

    template <typename T> static void put(std::vector<uint8_t> & to, T value) {
        const uint8_t * first = (const uint8_t *) &value;
        to.insert(to.end(), first, first + sizeof(value));
    }

    uint32_t below(uint32_t n) { return rng() % n; }

    std::vector<uint8_t> slot() {
        last_slot.clear();
        put(last_slot, (uint32_t) 0);
        put(last_slot, below(8) ? below(2) : below(18));
        return last_slot;
    }

    std::vector<Message> session;

private:
    static void name_at(std::vector<uint8_t> & payload, size_t at) {
        uint64_t value;
        if (at + sizeof(value) <= payload.size()) {
            memcpy(&value, &payload[at], sizeof(value));
            name(value);
            memcpy(&payload[at], &value, sizeof(value));
        }
    }

    void alloc(const Message & message) {
        std::vector<uint8_t> payload;
        uint64_t size = 0;
        if (message.payload.size() == 12) {
            memcpy(&size, &message.payload[4], sizeof(size));
        }
        put(payload, number_at(message.payload, 0));
        put(payload, n_buffers + 1);
        put(payload, address_of(n_buffers++));
        put(payload, size);
        add(ALLOC, payload, {});
    }

    uint32_t describe(const Message & message) {
        std::vector<uint8_t> payload;
        put(payload, ++n_tensors);
        payload.insert(payload.end(), message.payload.begin(), message.payload.begin() + sizeof(Tensor));
        add(TENSOR, payload, {});
        return n_tensors;
    }

    // In two of the codings where that can be, the second as changes of the first.
    void input(const Message & message) {
        const size_t head = sizeof(Tensor) + 1 + 8;
        if (message.payload.size() < head || below(8) == 0) {
            session.push_back(message);
            return;
        }
        const uint32_t tensor = describe(message);
        const std::vector<uint8_t> bytes(message.payload.begin() + head, message.payload.end());
        const uint64_t size = bytes.size();
        data(INPUT, tensor, below(2) ? EXACT : KEEP | EXACT, 0, size, bytes);
        std::vector<uint8_t> coded;
        switch (below(6)) {
            case 0: {
                const uint32_t at = size > 4 ? below(size - 4) : 0;
                for (const uint32_t word : { at, 4u, 0u, 0u, below(300) }) {
                    put(coded, word);
                }
                data(INPUT, tensor, CHANGES | (below(2) ? KEEP : 0), 0, size, coded);
                break;
            }
            case 1:
                put(coded, (uint32_t) (size / 4));
                put(coded, below(300));
                data(INPUT, tensor, REPEATS | (below(2) ? KEEP : 0), 0, size, coded);
                break;
            case 2: {
                const uint8_t coding = below(2) ? F16 : Q8;
                coded.assign(bytes.begin(), bytes.begin() + (coding == F16 ? size / 2 : size / 128 * 34));
                data(INPUT, tensor, coding | (below(4) ? 0 : KEEP), 0, size, coded);
                break;
            }
            case 3:
                pushed(n_pushed, EXACT, bytes);
                data(TAKE, tensor, EXACT, n_pushed++, size, {});
                break;
            default:
                break;
        }
    }

    // Sometimes pushed, and taken again: the fuzzer joins the server to itself.
    void get(const Message & message) {
        if (message.payload.size() != sizeof(Tensor) + 16) {
            session.push_back(message);
            return;
        }
        uint64_t size;
        memcpy(&size, &message.payload[sizeof(Tensor) + 8], sizeof(size));
        const uint32_t tensor = describe(message);
        const uint8_t coding = below(2) ? EXACT : below(3);
        if (below(4) == 0) {
            data(PUSH, tensor, coding, n_pushed, size, {});
            data(TAKE, tensor, coding, n_pushed++, size, {});
        }
        data(GET, tensor, coding, 0, size, {});
    }

    std::minstd_rand rng;
    std::vector<uint8_t> last_slot = std::vector<uint8_t>(8);
    uint64_t n_buffers = 0;
    uint32_t n_tensors = 0;
    uint64_t n_pushed  = 0;
};

} // namespace

std::vector<Message> named(const std::vector<Message> & session, uint32_t seed) {
    Writer writer(seed);
    for (const Message & message : session) {
        writer.write(message);
    }
    return writer.session;
}

Message small_named_message(uint32_t seed) {
    static const uint8_t COMMANDS_WITH_DATA[] = { INPUT, GET, PUSH, TAKE };
    Writer writer(seed);
    const uint32_t tensor = writer.below(4), size = writer.below(3) ? 32 * writer.below(9) : writer.below(300);
    switch (writer.below(6)) {
        case 0: {
            std::vector<uint8_t> payload;
            Writer::put(payload, (uint32_t) 0);
            Writer::put(payload, (uint64_t) (writer.below(4) ? writer.below(4) : BUFFER_SYMBOL | writer.below(3)));
            Writer::put(payload, address_of(writer.below(3)));
            Writer::put(payload, (uint64_t) writer.below(1 << 23));
            writer.add(ALLOC, payload, {});
            break;
        }
        case 1:
            writer.add(CONFIRM, {}, {});
            break;
        case 2:
            writer.add(TENSOR, { 0, 0, 0, 0 }, {});
            break;
        case 3:
            writer.add(GRAPH_AGAIN, writer.slot(), {});
            break;
        case 4:
            writer.pushed(writer.below(3), writer.below(3), std::vector<uint8_t>(size));
            break;
        default: {
            const uint8_t command = COMMANDS_WITH_DATA[writer.below(4)];
            const uint8_t coding = writer.below(5) | (writer.below(3) ? 0 : KEEP);
            writer.data(command, tensor, coding, writer.below(3), size, std::vector<uint8_t>(command == INPUT ? size : 0));
        }
    }
    return writer.session[0];
}

} // namespace fuzz
