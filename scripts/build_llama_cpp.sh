#!/usr/bin/env bash
# Builds llama.cpp's llama-bench and RPC server for benchmarks.generate, from the source that PyPI's llama-cpp-python has.
# Usage: scripts/build_llama_cpp.sh DIR    Then: python -m benchmarks.generate --llama-cpp DIR/build/bin
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
version=0.3.36
mkdir -p "$1"
cd "$1"
python=${PYTHON:-python3}

if [ ! -d source ]; then
  "$python" -m pip --disable-pip-version-check download --no-binary :all: --no-deps --no-build-isolation \
    --quiet "llama-cpp-python==$version" || {
    echo "$0: the source of llama-cpp-python $version cannot be downloaded, or pip lacks its build tools" \
      "(pip install scikit-build-core)" >&2
    exit 1
  }
  mkdir source
  tar -xf llama_cpp_python-*.tar.gz -C source --strip-components 1
fi
for tool in cmake ninja; do
  command -v "$tool" >/dev/null || { echo "$0: $tool is missing: pip install cmake ninja" >&2; exit 1; }
done
cmake -S source/vendor/llama.cpp -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_RPC=ON -DLLAMA_CURL=OFF \
  -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
cmake --build build --target llama-bench ggml-rpc-server
echo "built: $PWD/build/bin"
