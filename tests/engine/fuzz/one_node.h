#pragma once

// A client that has one operation computed, as ggml builds it, on random small shapes and bytes.

#include "message.h"

#include <cstdint>
#include <vector>

namespace fuzz {

// Messages to follow a HELLO: memory, random content, a graph of one operation, and again.
std::vector<Message> one_node_client(uint32_t seed);

} // namespace fuzz
