#!/usr/bin/env bash
# Do rules of selection matter once a model is trained? CIFAR-10 at 16 px, 10 images a class, no attachments, on a CPU.
# Every step resumes: run it again after an interruption.
#   docs/benchmarks/selection_training.sh cifar10-train.parquet OUT [SCORER]
# Then: python docs/benchmarks/selection_training.py OUT > docs/benchmarks/selection_training.md
set -euo pipefail
images=$1 out=$2 scorer=${3:-train}
export D2C_DEVICE=cpu D2C_WORKSPACE=$out/workspace OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 IMAGES=$images
methods="random interval match kernel random-window facility-location moments ot min max"

d2c score "$images" --size 16 --codec rgb --scorer "$scorer" --evals 8 --gpus 2
# Rules without randomness differ in the training seed alone; random draws differ in both.
for method in $methods; do
  for seed in 0 1 2; do
    d2c pack --per-class 10 --method $method --seed $seed --text none --vision none --licence LicenseRef-CIFAR-10 \
      --out "$out/shards/$method-$seed"
  done
done

one() {
  run=$2/runs/$1 seed=${1##*-}
  d2c train "$2/shards/$1" --model sit-tiny/4 --recipe small --steps 3000 --seed "$seed" --set flip=none \
    --held-out "$IMAGES" --watch-every 1000 --out "$run"
  d2c fid "$run" --samples 2000 --sampling-steps 20
}
export -f one
# The first alone, since it trains the measuring network.
one random-0 "$out"
# Arm by arm: those that are done can be compared.
for method in $methods; do
  for seed in 0 1 2; do echo $method-$seed; done
done | xargs -P "${JOBS:-2}" -I {} bash -c 'one "$1" "$2"' _ {} "$out"
