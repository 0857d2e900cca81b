#!/bin/sh
# The runs behind the first table of docs/results.md: a small base model, then every strategy, task order and seed. A stopped sweep
# goes on where it was. Further arguments go to the sweep: sh benchmarks/all_strategies.sh seeds=0-4 --jobs 2
set -e
PYTHON=${PYTHON:-.venv/bin/python}
BASE=runs/small_base
if [ ! -d $BASE/model ]; then
    $PYTHON -m mcit_lightning quickstart strategy.name=joint strategy.rank=64 strategy.alpha=128 'order=[digits,emoji,flags]' \
        prepare.language_layers=4 'data.root=${cache:quickstart_4_layers}' data.limit_train=480 optim.lr=1.0e-3 \
        tasks.digits.epochs=2 tasks.emoji.epochs=2 tasks.flags.epochs=2 zero_shot=false out=$BASE/run
    $PYTHON -m mcit_lightning export $BASE/run --to merged --out $BASE/model
fi
exec $PYTHON -m mcit_lightning sweep benchmarks/all_strategies.yaml orders=2 out=runs/all_strategies --threads 1 "$@"
