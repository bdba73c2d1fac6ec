// A libFuzzer target: the message loop of ggml-rpc-server, in this process, on a CPU backend. An
// input is what a client sends, from the HELLO on. See message.h for how an input names what only
// a running server knows: handles, addresses, the root of its file.

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "mesh-coding.h"
#include "transport.h"
#define private public // what its threads do is done here between messages
#include "mesh-push.h"
#undef private

#include "ggml-rpc.cpp" // the whole server, with what is static in it

#include "ggml-cpu.h"
#include "gguf.h"
#include "message.h"

#include <unistd.h>

using fuzz::Message;

static_assert(sizeof(fuzz::Tensor) == sizeof(rpc_tensor), "message.h has the protocol's tensor");

static const size_t MEMORY_LIMIT_BYTES = 4 << 20;
static const size_t PUSHED_LIMIT_BYTES = 16 << 20; // less than what a queue waits at

static std::vector<ggml_backend_t> backends;
static std::array<uint8_t, 32> file_root;

// The connection: reads come from the input, one message after the other.
struct socket_t::impl {
    impl(const uint8_t * data, size_t size) : input(data, data + size) {}

    bool receive(void * target, size_t size) {
        if (at == current.size() && !next()) {
            return false;
        }
        const size_t n = std::min(size, current.size() - at);
        memcpy(target, current.data() + at, n);
        at += n;
        return n == size;
    }

    void sent(const void * payload, size_t size) {
        uint8_t sum = 0; // what is sent is read
        for (size_t i = 0; i < size; i++) {
            sum ^= ((const uint8_t *) payload)[i];
        }
        volatile uint8_t sink = sum;
        (void) sink;
        if (!current.empty() && current[0] == RPC_CMD_ALLOC_BUFFER && size == sizeof(rpc_msg_alloc_buffer_rsp)) {
            rpc_msg_alloc_buffer_rsp reply;
            memcpy(&reply, payload, sizeof(reply));
            auto * buffer = (ggml_backend_buffer_t) reply.remote_ptr;
            buffers.push_back({ reply.remote_ptr, buffer ? (uint64_t) ggml_backend_buffer_get_base(buffer) : 0 });
        }
    }

private:
    bool next() {
        Message message;
        do {
            if (!fuzz::take_message(input, position, message)) {
                return false;
            }
            move_pushed(message);
        } while (message.command == fuzz::PUSHED);
        fuzz::resolve(message, buffers, file_root.data());
        current = fuzz::bytes_of(message);
        at = 0;
        return true;
    }

    // The ring is this server alone: what it pushed comes back, beside what an input has pushed to it.
    static void move_pushed(const Message & message) {
        mesh_taker & taker = mesh_server_taker();
        mesh_pushed pushed;
        while (mesh_server_pusher().queue.take(pushed, 0)) {
            make_room(taker, pushed.data.size());
            taker.queue.add(std::move(pushed), 0);
        }
        if (message.command == fuzz::PUSHED) {
            make_room(taker, message.payload.size());
            auto joint = std::make_unique<impl>(nullptr, 0);
            joint->current = message.payload;
            taker.serve(socket_ptr(new socket_t(std::move(joint))));
        }
    }

    static void make_room(mesh_taker & taker, size_t size) {
        if (taker.queue.queued_bytes + size > PUSHED_LIMIT_BYTES) {
            taker.queue.clear();
        }
    }

    std::vector<uint8_t> input;
    std::vector<uint8_t> current;
    std::vector<fuzz::Buffer> buffers;
    size_t position = 0;
    size_t at = 0;
};

socket_t::socket_t(std::unique_ptr<impl> p) : pimpl(std::move(p)) {}
socket_t::~socket_t() = default;
bool socket_t::recv_data(void * data, size_t size) { return size == 0 || pimpl->receive(data, size); }
bool socket_t::send_data(const void * data, size_t size) { pimpl->sent(data, size); return true; }
bool socket_t::send_frame(const void *, size_t, const void * payload, size_t size) { pimpl->sent(payload, size); return true; }
bool socket_t::flush() { return true; }
void socket_t::get_caps(uint8_t * caps) { memset(caps, 0, RPC_CONN_CAPS_SIZE); }
void socket_t::update_caps(const uint8_t *) {}
long long socket_t::send_some(const void * data, size_t size, bool) { pimpl->sent(data, size); return size; }
bool socket_t::readable() { return true; }
socket_ptr socket_t::accept() { return nullptr; }
socket_ptr socket_t::create_server(const char *, int) { return nullptr; }
socket_ptr socket_t::adopt_unix(int, const std::string &) { return nullptr; }
bool rpc_transport_init() { return true; }
void rpc_transport_shutdown() {}

// Its only caller here; the client's half of ggml-rpc.cpp connects to nothing.
static const uint8_t * next_input;
static size_t          next_size;
socket_ptr socket_t::connect(const char *, int) {
    return socket_ptr(new socket_t(std::make_unique<impl>(next_input, next_size)));
}

// A file to offer: one tensor of 64 floats named "w".
static void offer_a_file() {
    const std::string path = "/tmp/rpc-fuzzer-" + std::to_string(getpid()) + ".gguf";
    ggml_init_params params = { 1 << 16, nullptr, false };
    ggml_context_ptr ctx { ggml_init(params) };
    ggml_tensor * weight = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 8, 8);
    ggml_set_name(weight, "w");
    memset(weight->data, 0, ggml_nbytes(weight));
    gguf_context * gguf = gguf_init_empty();
    gguf_add_tensor(gguf, weight);
    gguf_write_to_file(gguf, path.c_str(), false);
    gguf_free(gguf);
    std::string why;
    GGML_ASSERT(mesh_server_offer().add_gguf(path, why));
    auto file = mesh_file::open(path, why);
    mesh_gguf parsed;
    GGML_ASSERT(file && mesh_parse_gguf_untrusted(*file, parsed, why));
    std::copy(parsed.fingerprint.begin(), parsed.fingerprint.end(), file_root.begin());
    unlink(path.c_str()); // it stays open
}

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    ggml_log_set([](ggml_log_level, const char * text, void *) {
        if (getenv("FUZZ_VERBOSE")) {
            fputs(text, stderr);
        }
    }, nullptr);
    backends = { ggml_backend_cpu_init() };
    ggml_backend_cpu_set_n_threads(backends[0], 1);
    mesh_server_memory().set_limit(MEMORY_LIMIT_BYTES);
    mesh_server_pusher().listening = true; // and somebody reads; the taker has only what is there
    mesh_server_pusher().reader.set(true);
    offer_a_file();
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    next_input = data;
    next_size  = size;
    try {
        rpc_serve_client(backends, nullptr, socket_t::connect("", 0));
    } catch (const std::exception &) { // as the server does
    }
    mesh_server_taker().queue.clear();
    GGML_ASSERT(mesh_server_memory().left() == MEMORY_LIMIT_BYTES && "a connection's memory outlives it");
    return 0;
}
