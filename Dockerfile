# Two images: `client`, for a device (neither Ray nor a database in it), and `coordinator`.
#   docker build --target client -t isthmus-client .
#   docker build --target coordinator -t isthmus-coordinator .
# torch is the CPU build. For the package index's own, with CUDA: --build-arg TORCH_INDEX=
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# What a device needs. Dependencies come before the sources, so that a change of the sources installs nothing again.
FROM ${PYTHON_IMAGE} AS dependencies
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PATH=/opt/isthmus/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
RUN python3 -m venv /opt/isthmus
WORKDIR /build
COPY constraints.txt ./
RUN pip install -q -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > requirements.txt \
 && pip install -q -c constraints.txt -r requirements.txt

FROM dependencies AS wheel
COPY . ./
RUN pip wheel -q --no-deps --no-build-isolation --wheel-dir /wheel .

FROM dependencies AS client
COPY --from=wheel /wheel /wheel
RUN pip install -q --no-deps --no-index /wheel/*.whl
# Volumes mounted at these folders take over their owner.
RUN useradd --uid 10001 --create-home isthmus \
 && install -d -o isthmus -g isthmus -m 700 /state /data /token
USER isthmus
WORKDIR /home/isthmus
ENTRYPOINT ["isthmus-client"]
CMD ["run", "--state-dir", "/state"]

FROM dependencies AS coordinator
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['coordinator'], sep='\n')" \
      > requirements.txt \
 && pip install -q -c constraints.txt -r requirements.txt
COPY --from=wheel /wheel /wheel
RUN pip install -q --no-deps --no-index /wheel/*.whl
RUN useradd --uid 10001 --create-home isthmus \
 && install -d -o isthmus -g isthmus -m 700 /state /state/admin /out
USER isthmus
WORKDIR /home/isthmus
EXPOSE 7443 7444
ENTRYPOINT ["isthmus"]
CMD ["up", "--state-dir", "/state"]
