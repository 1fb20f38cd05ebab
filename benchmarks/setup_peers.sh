#!/usr/bin/env bash
# Builds what compare_peers.py measures Eightfold against, under DIR: about 20 GB and, on two cores, half an hour.
# Peers come from the Python package index that pip is set up for; none is a dependency of Eightfold.
#
#   benchmarks/setup_peers.sh DIR [llama] [gguf] [transformers] [openvino]     (default: all of them)
#
# PYTHON is the interpreter that has Eightfold (default: python3). LAYERS (4) and FLOAT_LAYERS (2) are the numbers of
# layers of the GGUF models and of the others. LLAMA, TRANSFORMERS, OPENVINO, OPTIMUM, TORCH override what is installed.
set -euo pipefail

[ $# -ge 1 ] && [ "${1#-}" = "$1" ] || { sed -n 2,8p "$0"; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
dir=$(cd "$1" && pwd)
shift
[ $# -gt 0 ] || set -- llama gguf transformers openvino
python=${PYTHON:-python3}
layers=${LAYERS:-4}
float_layers=${FLOAT_LAYERS:-2}
llama=${LLAMA:-llama-cpp-python==0.3.36}
transformers=${TRANSFORMERS:-transformers==5.23.0}
openvino=${OPENVINO:-openvino==2026.4.1}
# Later versions export all experts as one operation, which the CPU plugin runs six to eight times slower here.
optimum=${OPTIMUM:-optimum-intel[openvino]==1.27.0}
torch=${TORCH:-torch==2.13.0}
mkdir -p "$dir/models"

environment() { # NAME PACKAGE…
    [ -x "$dir/$1/bin/python" ] || "$python" -m venv "$dir/$1"
    "$dir/$1/bin/python" -m pip install --quiet "${@:2}"
}

build_llama() { # the Python package's source holds llama.cpp, whose own benchmarks are what we need
    environment v-build cmake ninja
    mkdir -p "$dir/source"
    "$dir/v-build/bin/python" -m pip download --quiet --no-deps --no-binary :all: --dest "$dir/source" "$llama"
    tar -xzf "$dir"/source/llama_cpp_python-*.tar.gz -C "$dir/source"
    local source
    source=$(find "$dir/source" -maxdepth 3 -path '*/vendor/llama.cpp' -type d | head -n 1)
    PATH="$dir/v-build/bin:$PATH" cmake -S "$source" -B "$dir/build/llama" -G Ninja -DCMAKE_BUILD_TYPE=Release \
        -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DBUILD_SHARED_LIBS=OFF
    PATH="$dir/v-build/bin:$PATH" cmake --build "$dir/build/llama" --target llama-bench llama-batched-bench
}

make_gguf() {
    environment v-gguf numpy gguf
    for kind in q8_0 q6_k; do
        "$dir/v-gguf/bin/python" "$here/make_gguf.py" "$dir/models/m$layers-$kind.gguf" --layers "$layers" --type "$kind"
    done
}

make_folder() { # the same random weights that Eightfold's bf16 contender runs
    [ -f "$dir/models/hf$float_layers/config.json" ] ||
        "$python" -m eightfold make-random "$dir/models/hf$float_layers" --shape 8x7b --layers "$float_layers"
}

for what in "$@"; do
    case $what in
    llama) build_llama ;;
    gguf) make_gguf ;;
    transformers)
        environment v-hf "$torch" "$transformers" accelerate
        make_folder
        ;;
    openvino)
        environment v-ov "$torch" "$openvino" "$optimum"
        make_folder
        HF_HUB_OFFLINE=1 "$dir/v-ov/bin/optimum-cli" export openvino --model "$dir/models/hf$float_layers" \
            --task text-generation-with-past --weight-format int8 --disable-convert-tokenizer \
            "$dir/models/ov$float_layers"
        ;;
    *)
        echo "unknown peer: $what" >&2
        exit 2
        ;;
    esac
done
