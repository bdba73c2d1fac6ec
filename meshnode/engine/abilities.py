"""What the pinned engine with our patches can do, for those who plan with it. • Sans-IO.

One line an ability, changed in the commit that brings its patch.
"""

from __future__ import annotations

OUTPUT_AT_HOME = True
"""GGML_RPC_MESH_OUTPUT: the output layer on a device of the orchestrator."""
MAX_DEVICES = 80
"""llama_max_devices(), GGML_SCHED_MAX_BACKENDS: 64 workers and what this machine has."""
