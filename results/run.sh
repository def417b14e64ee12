#!/bin/sh
# Run the experiments of docs/results.md, from the root of the repository:
#
#   results/run.sh data SOURCE        prepare the data from SOURCE, which contains bccd, cifar10_jpeg
#                                     (train.tar.xz and test.tar.xz) and mini_places365
#   results/run.sh PART [ARGUMENTS]   train; ARGUMENTS are passed to tools/run_seeds.py
#   results/run.sh gates              draw the gates of the networks with SE
#   results/run.sh tables             update the tables and curves in the documents
#   results/run.sh publish            write a model card for each config, and the small networks to
#                                     senet_transfer/pretrained
#
# PART is cifar20, cifar110, shapes, places, bccd, bccd50, pretrain, transfer_bccd, transfer_places
# or probe. pretrain must be finished before the parts that follow it. Repeat a command to continue.
# Several parts can run at the same time.
#
# Variables: SEEDS="0 1 2", SEED=1 (the run for gates and publish; if it does not exist, publish uses
# seed 0, and gates skips the network), JOBS=1 (runs at the same time), MINUTES (time limit of the
# command), RECORDS=results (folder of the records), PYTHON=python, DETECTRON2_DATASETS=datasets and,
# if there is no git or no .git, GIT_COMMIT.
set -eu
python=${PYTHON:-python}
root=${DETECTRON2_DATASETS:-datasets}
SEED=${SEED:-1}
part=${1:-}
[ $# -eq 0 ] || shift

# Train plain and SE: sweep PLAIN SE [KEY VALUE ...]
sweep() {
    plain=configs/$1.yaml
    se=configs/$2.yaml
    shift 2
    "$python" tools/run_seeds.py --config-file "$plain" --config-file "$se" \
        --seeds ${SEEDS:-0 1 2} --jobs "${JOBS:-1}" ${MINUTES:+--minutes "$MINUTES"} \
        --output output --results "${RECORDS:-results}" --quiet "$@"
}

# Same as sweep, on CIFAR-10 recompressed as JPEG; with CUDA graphs on a GPU.
cifar() {
    plain=$1
    se=$2
    shift 2
    graph=$(command -v nvidia-smi >/dev/null && echo "SOLVER.COMPILE graph" || true)
    sweep "$plain" "$se" DATASETS.TRAIN "('cifar10_jpeg',)" DATASETS.TEST "('cifar10_jpeg',)" \
        $graph "$@"
}

# Same as sweep, for 10 epochs and in bfloat16.
places() {
    sweep "$@" SOLVER.EPOCHS 10 MODEL.CLASSIFIER.CHANNELS_LAST True SOLVER.AMP.ENABLED True \
        SOLVER.AMP.DTYPE bfloat16
}

# Publish a run or its model card: publish RUN NAME [OPTION ...]
publish() {
    run=$1
    title=$2
    shift 2
    "$python" -m senet_transfer.cli.main push "$run/model_final.pth" "$title" \
        --license apache-2.0 --data "$data" --runs "$folder" "$@"
}

# Add the network of $run to the package: bundle NAME
bundle() {
    publish "$run" "senet_transfer/$1" --bundle --half --evaluate
}

# Draw the gates of a network if it has been trained: draw_gates CONFIG NAME [OPTION ...]
draw_gates() {
    run=output/$1/seed$SEED
    name=$2
    shift 2
    [ -e "$run/model_final.pth" ] || return 0
    "$python" -m senet_transfer.cli.main gates --weights "$run/model_final.pth" \
        --output "output/gates/$name" --record "${RECORDS:-results}/gates/$name.json" --quiet "$@"
    cp "output/gates/$name/blocks.png" "docs/images/gates_$name.png"
    cp "output/gates/$name/blocks.csv" "${RECORDS:-results}/gates/$name.csv"
}

case $part in
data)
    source=$(realpath "${1:?is missing: the folder SOURCE}")
    mkdir -p "$root/cifar10_jpeg"
    [ -e "$root/bccd" ] || ln -s "$source/bccd" "$root/bccd"
    "$python" datasets/prepare_shapes.py --output "$root/shapes"
    "$python" datasets/prepare_cifar.py --source "$source/cifar10_jpeg" --output "$root/cifar10_jpeg"
    for split in train test; do
        tar -xJf "$source/cifar10_jpeg/$split.tar.xz" -C "$root/cifar10_jpeg"
    done
    for split in val train_standard; do
        "$python" datasets/prepare_places365.py --source "$source/mini_places365" \
            --split $split --output "$root/places365/$split"
    done
    ;;
cifar20) cifar cifar10_resnet20 cifar10_se_resnet20 "$@" ;;
cifar110)
    cifar cifar10_resnet110 cifar10_se_resnet110 MODEL.CLASSIFIER.CHANNELS_LAST True \
        SOLVER.AMP.ENABLED True SOLVER.AMP.DTYPE bfloat16 SOLVER.CHECKPOINTS_KEPT 2 "$@"
    ;;
shapes) sweep demo_faster_rcnn_r18 demo_faster_rcnn_se_r18 "$@" ;;
places) places demo_places365_r18 demo_places365_se_r18 "$@" ;;
bccd) sweep bccd_r18 bccd_se_r18 "$@" ;;
bccd50) sweep bccd_r50 bccd_se_r50 "$@" ;;
pretrain) SEEDS=0 sweep cifar10_64px_r18 cifar10_64px_se_r18 "$@" ;;
transfer_bccd) sweep transfer_bccd_r18 transfer_bccd_se_r18 "$@" ;;
transfer_places) places transfer_demo_places365_r18 transfer_demo_places365_se_r18 "$@" ;;
probe)
    for network in r18 se_r18; do
        "$python" -m senet_transfer.cli.main probe --quiet \
            --weights "output/cifar10_64px_$network/seed0/model_final.pth" \
            --train "$root/places365/train_standard" --data "$root/places365/val" \
            --output "output/probe_$network" \
            --record "${RECORDS:-results}/probe_cifar10_64px_$network/seed0.json"
    done
    ;;
gates)
    draw_gates cifar10_se_resnet20 cifar10 --data "$root/cifar10_jpeg/test"
    draw_gates demo_places365_se_r18 scenes --data "$root/places365/val"
    [ ! -e output/gates/scenes/figure6.png ] ||
        cp output/gates/scenes/figure6.png docs/images/gates.png
    for group in class size; do
        draw_gates demo_faster_rcnn_se_r18 "shapes_by_$group" --group-by $group \
            --data "$root/shapes/annotations/instances_val.json" --images "$root/shapes/val"
        draw_gates bccd_se_r18 "bccd_by_$group" --group-by $group --data "$root/bccd:test"
    done
    ;;
publish)
    for folder in "${RECORDS:-results}"/*/; do
        name=$(basename "$folder")
        run=output/$name/seed$SEED
        [ -e "$run" ] || run=output/$name/seed0
        [ -e "$run/model_final.pth" ] || continue
        case $name in
        demo_faster_rcnn_*) data="rendered shapes (datasets/prepare_shapes.py)" ;;
        *bccd*) data="BCCD" ;;
        *places*) data="8 classes of Places365" ;;
        *) data="CIFAR-10 recompressed as JPEG" ;;
        esac
        publish "$run" "$name" --card "${folder}README.md"
        case $name in
        cifar10_resnet20) bundle cifar10_jpeg_resnet20 ;;
        cifar10_se_resnet20) bundle cifar10_jpeg_se_resnet20 ;;
        demo_faster_rcnn_se_r18) bundle shapes_se_r18 ;;
        esac
    done
    ;;
tables)
    "$python" tools/run_seeds.py --results "${RECORDS:-results}" --update README.md docs/results.md \
        --curves docs/images
    ;;
*)
    sed -n '2,20p' "$0" >&2
    exit 2
    ;;
esac
