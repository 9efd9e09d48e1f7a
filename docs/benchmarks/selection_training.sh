#!/usr/bin/env bash
# Do rules of selection matter once a model is trained? CIFAR-10, 10 images a class, no attachments, on a CPU.
# Every step resumes: run it again after an interruption.
#   docs/benchmarks/selection_training.sh cifar10-train.parquet OUT [SCORER]
# Then: python docs/benchmarks/selection_training.py OUT > docs/benchmarks/selection_training.md
set -euo pipefail
images=$1 out=$2 scorer=${3:-train}
export D2C_DEVICE=cpu D2C_WORKSPACE=$out/workspace OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1

d2c score "$images" --scorer "$scorer" --evals 4 --gpus 2
# Rules without randomness differ in the training seed alone; random draws differ in both.
for method in random random-window interval facility-location kernel match; do
  for seed in 0 1 2; do
    d2c pack --per-class 10 --method $method --seed $seed --text none --vision none --licence LicenseRef-CIFAR-10 \
      --out "$out/shards/$method-$seed"
  done
done

one() {
  run=$2/runs/$1
  d2c train "$2/shards/$1" --model sit-tiny/4 --recipe small --steps 1500 --seed "${1##*-}" --out "$run"
  d2c fid "$run" --samples 1000 --sampling-steps 20
}
export -f one
# The first alone, since it trains the measuring network; the others as many arms as there is time for.
one random-0 "$out"
for methods in "random interval match" "random-window facility-location kernel"; do
  for seed in 0 1 2; do
    for method in $methods; do echo $method-$seed; done
  done
done | xargs -P 2 -I {} bash -c 'one "$1" "$2"' _ {} "$out"
