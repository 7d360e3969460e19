# zods on CPUs, with DeepSpeed's operators built, and with what ranks on several hosts need.
#   docker build -f docker/cpu.Dockerfile --build-arg IMAGE=zods-cpu:$(git rev-parse --short HEAD) -t zods-cpu .
#   docker run --shm-size 4g zods-cpu launch/quickstart.sh
# BASE needs Python 3.11 or newer and apt. Name it by digest (debian@sha256:...) for builds that can be repeated.
ARG BASE=debian:12-slim
FROM ${BASE}
# The host keys of ssh are removed: everybody who has the image would know them. `ssh-keygen -A` makes new ones.
# The compiler stays: kernels are built for the processor that they run on, at their first use.
RUN apt-get update && apt-get install -y --no-install-recommends \
      python3 python3-dev python3-venv g++ git ca-certificates libaio-dev numactl \
      openssh-server openssh-client pdsh iproute2 \
    && apt-get clean && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* && mkdir -p /run/sshd
WORKDIR /zods
COPY constraints.txt pyproject.toml setup.py README.md LICENSE ./
COPY zods zods
COPY launch launch
COPY ds_configs ds_configs
RUN bash -c '. launch/setup.sh report && . launch/setup.sh report,monitor,lora,mpi --async_io' && rm -rf /root/.cache
ENV PATH=/zods/.venv/bin:$PATH DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=/zods/.venv/torch_extensions TOKENIZERS_PARALLELISM=false
# written into each run's folder
ARG IMAGE=zods-cpu
ENV ZODS_IMAGE=${IMAGE}
ENTRYPOINT ["bash"]
