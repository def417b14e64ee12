"""Run a detector or classifier on images and videos.

    senet predict --weights output/model_final.pth --input photos --output predictions
    senet predict --weights cadene/se_resnet50 --input photo.jpg
    senet predict --weights COCO-Detection/faster_rcnn_R_50_FPN_3x --input street.mp4

A detector's detections are drawn on the images and written to a JSON file in COCO format. For a
classifier, the five most probable classes of each image are printed and written to a JSON file. For
a video, the results are drawn on a copy of the video, and written to a file with one JSON object
per frame.
"""

import argparse

from senet_transfer.cli.arguments import Parser, run_command
from senet_transfer.errors import UserError
from senet_transfer.utils.text import counted

# A copy of FORMATS in senet_transfer/engine/predictor/files.py.
FORMATS = ("json", "coco", "csv", "yolo")


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(description=__doc__)
    parser.lists = ("--input",)
    add = parser.add_argument
    add(
        "--weights",
        required=True,
        help="a checkpoint, the output folder of a run, an exported file, the name of published "
        "weights (also hf-hub:OWNER/NAME), or the name of a detector in Detectron2's model zoo",
    )
    add(
        "--config-file",
        default="",
        help="config file; default: the config.yaml next to the weights",
    )
    add(
        "--input",
        action="append",
        required=True,
        help="one or more image files, folders, patterns, .txt lists of images, HTTP(S) URLs, "
        "video files, stream URLs (rtsp://...) or a camera index",
    )
    add("--output", default="predictions", help="output folder (default: predictions)")
    add(
        "--format",
        choices=FORMATS,
        default="",
        help="format of the results for images (for videos, always JSON Lines); default: coco for "
        "detectors, json for classifiers",
    )
    add(
        "--threshold",
        type=float,
        default=0.5,
        help="minimum score of detections, between 0 and 1 (default: 0.5)",
    )
    add(
        "--limit",
        type=int,
        help="process only the first LIMIT images, and the first LIMIT frames of each video",
    )
    add("--batch-size", type=int, default=1, help="number of images per batch (default: 1)")
    add(
        "--workers", type=int, default=0, help="number of processes that decode images (default: 0)"
    )
    add("--device", default="", help="device, such as cpu or cuda:1; default: a GPU if available")
    add("--half", action="store_true", help="compute in half precision")
    add("--tta", action="store_true", help="use test-time augmentation")
    add(
        "--draw",
        action=argparse.BooleanOptionalAction,
        help="write images with the predictions drawn on them; default: only for detectors",
    )
    add(
        "--cam",
        action="store_true",
        help="draw a classifier's class activation maps, and the change to each map caused by the "
        "last SE gate",
    )
    add("--quiet", action="store_true", help="hide the progress bar")
    add("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def main(args: argparse.Namespace) -> None:
    """Run the model on images and videos, and print the results and the paths of written files."""
    from senet_transfer.engine.predictor.cam import class_activation_map
    from senet_transfer.engine.predictor.files import predict_files, predict_video, video_stem
    from senet_transfer.engine.predictor.inputs import find_photos, is_video
    from senet_transfer.engine.predictor.load import load
    from senet_transfer.engine.predictor.predictor import ClassifierPredictor

    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}; expected 1 or more.")
    videos = [name for name in args.input if is_video(name)]
    if len(set(map(video_stem, videos))) < len(videos):
        raise UserError(
            f"Two of the videos {', '.join(videos)} have the same name, so their results would "
            "have the same path. Process them with different --output folders."
        )
    images = find_photos([name for name in args.input if name not in videos])[: args.limit]
    predictor = load(
        args.weights,
        config_file=args.config_file,
        options=[*args.opts, *(("TEST.AUG.ENABLED", "True") if args.tta else ())],
        device=args.device,
        half=args.half,
        batch_size=args.batch_size,
        threshold=args.threshold,
    )
    classifies = isinstance(predictor, ClassifierPredictor)
    if args.cam and not classifies:
        raise UserError("--cam requires a classifier, but the model is a detector. Omit --cam.")
    options = {"draw": True if args.cam else args.draw, "quiet": args.quiet}
    for name in videos:
        path, frames = predict_video(predictor, name, args.output, limit=args.limit, **options)
        print(f"{name}: {counted(frames, 'frame')}, results written to {path}")
    if not images:
        return
    if args.cam:
        options["plot"] = lambda result: class_activation_map(predictor, result.photo).plot()
    path = predict_files(
        predictor,
        images,
        args.output,
        form=args.format,
        workers=args.workers,
        report=print if classifies else lambda result: None,
        **options,
    )
    if classifies:
        print(f"{counted(len(images), 'image')}: predictions written to {path}")
    else:
        drawings = "" if args.draw is False else f"drawings written to {args.output}, "
        print(f"{counted(len(images), 'image')}: {drawings}detections written to {path}")


def command(words: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    run_command(main, parser().parse_args(words))
