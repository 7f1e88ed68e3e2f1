#!/bin/sh
# Installs the trainers whose loaders read our exports into a virtual environment of their own, as far as they go without CUDA.
#
#   sh tests_real/install_trainers.sh [FOLDER]        (default .venv-trainers; PYTHON names the interpreter, 3.11 or 3.12)
#
# torch first, in the version that has a CPU build, so that nothing drags CUDA in. verl wants older transformers than the rest; they
# lie in FOLDER/verl, which goes on PYTHONPATH for verl alone. A tool that cannot be installed leaves its reason in FOLDER/missing/TOOL,
# and its test is skipped with that reason; without reason and without tool, the test fails.
set -u
venv=${1:-.venv-trainers}
python=${PYTHON:-python3}
transformers='transformers==5.23.0'
"$python" -m venv "$venv" || exit 1
pip="$venv/bin/pip --disable-pip-version-check --quiet install"
rm -rf "$venv/missing" "$venv/verl" "$venv/done"
mkdir -p "$venv/missing" "$venv/verl"

$pip torch==2.13.0 || exit 1
$pip "$transformers" accelerate 'datasets>=4.7' pillow || exit 1

# check TOOL MODULE [PYTHONPATH]: it imports, or the reason is kept
check() {
    PYTHONPATH=${3:-} "$venv/bin/python" -c "import $2" 2>"$venv/missing/$1" && rm "$venv/missing/$1" && return
    echo "install_trainers: $1 cannot be used here: $(tail -n 1 "$venv/missing/$1")" >&2
}

$pip --no-deps trl==1.16.0
check trl trl

$pip verifiers==0.4.0 torch==2.13.0 "$transformers"
check verifiers verifiers.v1.trace

$pip ray peft pylatexenc tensorboard codetiming hydra-core 'tensordict>=0.8,<=0.10,!=0.9.0' torchdata torch==2.13.0 "$transformers"
$pip --no-deps verl==0.9.1 qwen-vl-utils
$pip --no-deps --target "$venv/verl" 'transformers>=5.5.3,!=5.6.0,<5.11' 'tokenizers>=0.22,<0.23' 'huggingface-hub<2'
check verl verl.utils.dataset.multiturn_sft_dataset "$venv/verl"

# verl looks at pictures through torchvision, which must be the CPU build that goes with torch: another one breaks what is here
$pip --no-deps torchvision==0.28.0
check torchvision torchvision
test -f "$venv/missing/torchvision" && "$venv/bin/pip" --quiet uninstall --yes torchvision

if "$venv/bin/pip" list 2>/dev/null | grep -i '^nvidia-'; then
    echo "install_trainers: CUDA packages came along; pin what pulled them in" >&2
    exit 1
fi
touch "$venv/done"
