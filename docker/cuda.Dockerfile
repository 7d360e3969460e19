# zods on NVIDIA GPUs, with DeepSpeed's async_io operator and apex's fused norms built.
#   docker build -f docker/cuda.Dockerfile --build-arg IMAGE=zods-cuda:$(git rev-parse --short HEAD) -t zods-cuda .
#   docker run --gpus all --shm-size 16g zods-cuda launch/gpu_check.sh
# This file has not been built yet. BASE needs CUDA's compiler, of the version of CUDA that torch was built with. Name it by digest
# (nvidia/cuda@sha256:...) for builds that can be repeated.
ARG BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04
FROM ${BASE}
# The host keys of ssh are removed: everybody who has the image would know them. `ssh-keygen -A` makes new ones.
RUN apt-get update && apt-get install -y --no-install-recommends \
      python3 python3-dev python3-venv g++ git ca-certificates libaio-dev numactl \
      openssh-server openssh-client pdsh iproute2 \
    && apt-get clean && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* && mkdir -p /run/sshd
WORKDIR /zods
COPY constraints.txt pyproject.toml setup.py README.md LICENSE ./
COPY zods zods
COPY launch launch
COPY ds_configs ds_configs
ENV DS_ACCELERATOR=cuda
RUN bash -c '. launch/setup.sh report && . launch/setup.sh report,monitor,lora,mpi --async_io' && rm -rf /root/.cache
# apex: give a commit to have it. Compute capabilities: of A100, H100 and B200.
ARG APEX_COMMIT=
ARG TORCH_CUDA_ARCH_LIST="8.0 9.0 10.0"
RUN if [ -n "${APEX_COMMIT}" ]; then \
      git clone https://github.com/NVIDIA/apex /tmp/apex && git -C /tmp/apex checkout "${APEX_COMMIT}" \
      && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 .venv/bin/python -m pip install --no-build-isolation /tmp/apex && rm -rf /tmp/apex; \
    fi
ENV PATH=/zods/.venv/bin:$PATH TORCH_EXTENSIONS_DIR=/zods/.venv/torch_extensions TOKENIZERS_PARALLELISM=false
# written into each run's folder
ARG IMAGE=zods-cuda
ENV ZODS_IMAGE=${IMAGE}
ENTRYPOINT ["bash"]
