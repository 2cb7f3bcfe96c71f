# syntax=docker/dockerfile:1

# For both architectures at once: docker buildx build --platform linux/amd64,linux/arm64 -t wharfinger .

FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY Cargo.toml Cargo.lock build.rs ./
COPY .cargo .cargo
COPY src src
COPY config config
COPY migrations migrations
COPY runner runner
# The caches stay on the build machine, apart for each architecture; the binary is copied out of them.
ARG TARGETARCH
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target,id=wharfinger-target-${TARGETARCH} \
    cargo build --profile dist --locked --bin wharfinger \
    && install -D -m 0755 target/dist/wharfinger /out/wharfinger \
    && install -d -m 0700 /out/data

# Debian's C library and certificates; no shell, no package manager.
FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /out/wharfinger /usr/local/bin/wharfinger
# A volume that is mounted here for the first time takes over owner and mode.
COPY --from=build --chown=65532:65532 --chmod=0700 /out/data /data

# Reachable through published ports; the rest is as in config/default.toml.
ENV WHARFINGER_DATA_DIR=/data \
    WHARFINGER_LISTEN=0.0.0.0:8080
USER 65532:65532
WORKDIR /data
VOLUME /data
EXPOSE 8080 9090
# SIGTERM starts the graceful stop. It takes up to drain_delay and drain_timeout: give docker stop --time 140.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=30s --retries=3 CMD ["/usr/local/bin/wharfinger", "health"]
ENTRYPOINT ["/usr/local/bin/wharfinger"]
CMD ["serve"]
