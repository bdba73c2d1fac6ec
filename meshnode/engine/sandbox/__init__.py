"""What an rpc-server may do to the machine it runs on: next to nothing.

`policy` says what one server needs, `check` what this machine can enforce; `launch` runs between us
and the server, takes everything else away from itself and becomes the server.
"""
