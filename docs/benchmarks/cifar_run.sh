#!/usr/bin/env bash
# A run to look at: 2 % of CIFAR-10, pixels as latents, a small model, on a CPU core. Every step resumes.
#   docs/benchmarks/cifar_run.sh cifar10-train.parquet OUT [SCORER]
# Then: python docs/benchmarks/cifar_run.py OUT > docs/benchmarks/cifar-run.md
set -euo pipefail
images=$1 out=$2 scorer=${3:-train}
export D2C_DEVICE=cpu D2C_WORKSPACE=${D2C_WORKSPACE:-$out/workspace} OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1

[ -e "$D2C_WORKSPACE/scores/stage.json" ] || d2c score "$images" --scorer "$scorer" --evals 4 --gpus 2
d2c pack --per-class 100 --method random --seed 0 --text hashed --vision scorer --grid 8 \
  --licence LicenseRef-CIFAR-10 --out "$out/shards"
d2c train "$out/shards" --model sit-tiny/4 --recipe small --steps 4000 --seed 0 --set flip=grid --held-out "$images" \
  --watch-every 500 --out "$out/run"
d2c sample "$out/run" --count 100 --sampling-steps 50
