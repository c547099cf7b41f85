# docker build -t atp .        (from a clean clone; no network but Debian's mirrors is needed)
# docker run --rm -p 127.0.0.1:8000:8000 atp

FROM debian:bookworm-slim AS build
WORKDIR /src
# What `make deps` runs. A layer of its own: sources change more often than packages do.
COPY scripts/install_deps.sh scripts/
RUN scripts/install_deps.sh && rm -rf /var/lib/apt/lists/*
COPY . .
RUN cmake --preset cpu-release -DATP_BUILD_TESTS=OFF \
 && cmake --build --preset cpu-release --target atp \
 && strip --strip-unneeded build/cpu-release/atp

FROM debian:bookworm-slim
# The packages of the shared libraries that the binary names; tests/deploy checks this list against the binary.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      libabsl20220623 libfmt9 libgrpc++1.51 libgrpc29 libhwy1 libicu72 libpcre2-8-0 libprometheus-cpp-core1.0 \
      libsentencepiece0 libspdlog1.10 libssl3 libyaml-cpp0.7 zlib1g \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /src/build/cpu-release/atp /usr/local/bin/atp
COPY --from=build /src/LICENSE /usr/share/doc/atp/LICENSE
COPY models/default /models/default
COPY deploy/config/atp.yaml /etc/atp/atp.yaml
# A number, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /
# OpenAI REST, gRPC, metrics and health.
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
# bash speaks TCP: no curl in the image.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/8002 && printf 'GET /health/ready HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n' >&3 && IFS= read -r -t 2 status <&3 && [[ $status == 'HTTP/1.1 200'* ]]"]
ENTRYPOINT ["/usr/local/bin/atp"]
CMD ["serve", "--config", "/etc/atp/atp.yaml"]
