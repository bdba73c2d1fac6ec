#pragma once

// A session as a client of the mesh writes it: buffers by names of its own, tensors by number,
// inputs in one of their codings, graphs by slot, a result that passes through another server.

#include "message.h"

#include <cstdint>
#include <vector>

namespace fuzz {

std::vector<Message> named(const std::vector<Message> & session, uint32_t seed);

// One message of those, with numbers that most probably name something.
Message small_named_message(uint32_t seed);

} // namespace fuzz
