"""Frames of video files, streams and cameras."""

import math
from collections.abc import Iterator
from types import TracebackType

import cv2

from senet_transfer.engine.predictor.inputs import Photo
from senet_transfer.errors import UserError
from senet_transfer.utils.text import check_utf8

_USUAL_RATE = 25.0


class Video:
    """Iterable over the frames of a video, which are read one by one.

    As a context manager, a ``Video`` is closed on exit.

    Attributes:
        name: Path of a file, URL of a stream, or index of a camera.
        rate: Frames per second; 25 if the video does not specify a valid rate.
        frames: Number of frames; None if it is unknown.
    """

    def __init__(self, name: str):
        """
        Args:
            name: Path, URL or camera index that OpenCV can open.

        Raises:
            UserError: If the video can't be opened.
        """
        self.name = name
        check_utf8(name, "videos")  # With other paths, OpenCV would crash.
        self._capture = cv2.VideoCapture(int(name) if name.isdigit() else name)
        if not self._capture.isOpened():
            raise UserError(
                f"{name} can't be opened as a video. Expected a video file that OpenCV's FFmpeg "
                "can read, the URL of a stream, or the index of a camera such as 0."
            )
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate < math.inf else _USUAL_RATE
        count = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.frames = count if count > 0 else None

    def __iter__(self) -> Iterator[Photo]:
        """Yield each frame as an RGB image."""
        index = 0
        while True:
            read, frame = self._capture.read()
            if not read:
                break
            name = f"{self.name} frame {index}"
            yield Photo(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), name, name)
            index += 1
        if not index:
            raise UserError(
                f"{self.name} contains no readable frames. Check the file, stream or camera."
            )

    def __enter__(self) -> "Video":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._capture.release()
