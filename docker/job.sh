#!/bin/sh
# The job of docker-compose.yml: leaves each edge a one-time token in a volume that only the two of them share,
# fine-tunes over all of them as `make demo` does, and writes the adapter to /out/adapter.
# Usage: job.sh NAME...
set -eu
umask 077

for name in "$@"; do
  isthmus enroll "$name" --json | python -c 'import json, sys; print(json.load(sys.stdin)["token"])' \
    > "/tokens/$name/new"
  mv "/tokens/$name/new" "/tokens/$name/token"
done
rm -rf /out/adapter # an earlier run's
exec isthmus finetune --dataset notes --devices "$#" --wait 300 --out /out/adapter \
  --steps 60 --cut-layer 2 --batch-size 8 --sequence-length 128 --learning-rate 4e-3 --warmup-steps 5 \
  --aggregate-every 10 --checkpoint-every 20 --validation-fraction 0.05 \
  --target-modules q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj
