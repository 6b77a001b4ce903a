# What Ray and Tandem need in a shell of a cluster's node. The launcher files have ~/.bashrc source it.
export PATH="$HOME/tandem/.venv/bin:$PATH"
# Every Ray process and client must show the token in ~/.ray/auth_token.
export RAY_AUTH_MODE=token
