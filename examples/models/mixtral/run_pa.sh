#!/usr/bin/env bash
# Mixtral's dialogue test: run_pa.sh [-trust_remote_code] WEIGHTS [dp tp moe_tp moe_ep] [options of run_pa.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../eightfold.sh" run_pa.sh "$@"
