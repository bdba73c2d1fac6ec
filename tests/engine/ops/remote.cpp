// Linked into llama.cpp's own test-backend-ops, unchanged: makes the devices of the servers that
// MESH_TEST_RPC names (as --rpc does) known before it looks for devices to test.

#include "ggml-backend.h"
#include "ggml-rpc.h"

#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>

static const bool registered = [] {
    setvbuf(stdout, nullptr, _IOLBF, BUFSIZ); // what was said is known if it aborts
    std::istringstream endpoints(std::getenv("MESH_TEST_RPC") ? std::getenv("MESH_TEST_RPC") : "");
    for (std::string endpoint; std::getline(endpoints, endpoint, ',');) {
        ggml_backend_register(ggml_backend_rpc_add_server(endpoint.c_str()));
    }
    return true;
}();
