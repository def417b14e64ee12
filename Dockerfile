# Container image with the `senet` program for one or more NVIDIA GPUs. The host needs the NVIDIA Container
# Toolkit. Build the image with `make container`. To run it in the current folder as the current user:
#
#   docker run --rm --gpus all --shm-size 8g --user "$(id -u):$(id -g)" --volume "$PWD:/workspace" \
#     senet_transfer train --config-file faster_rcnn_se_r50 --num-gpus 8
#
# The base image has only the CUDA runtime, because torch includes cuBLAS, cuDNN and NCCL.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# torch.compile needs the compiler and Python's headers to build kernels at run time.
# The package versions are those of the base image's Ubuntu release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY configs configs
COPY senet_transfer senet_transfer
COPY tools/install_detectron2.py tools/classify_onnx.py tools/detect_onnx.py tools/onnx_images.py tools/
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir --constraint constraints.txt --upgrade pip \
    && pip install --no-cache-dir --constraint constraints.txt --build-constraint constraints.txt . \
    && python tools/install_detectron2.py \
    && rm -rf build ./*.egg-info

RUN useradd --uid 10001 senet && install --directory --owner senet /workspace
USER 10001
# The user of `docker run --user` has no account in the image. Caches need these variables.
ENV HOME=/tmp USER=senet
WORKDIR /workspace
ENTRYPOINT ["senet"]
CMD ["--help"]
