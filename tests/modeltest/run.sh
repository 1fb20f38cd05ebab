#!/usr/bin/env bash
# Performance and accuracy tests; without words it says which. Data sets lie in data/ beside it, results go to outputs/.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 2
exec bash "$here/../../examples/eightfold.sh" run.sh "$here" "$@"
