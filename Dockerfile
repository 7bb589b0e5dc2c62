# The static program in a small image. Models, data and runs belong into volumes:
#
#     docker build -t hydralora .
#     docker run --rm -v "$PWD:/work" hydralora train recipe.yaml
#     docker run --rm -v "$PWD:/work" -p 8080:8080 hydralora serve --model m --host 0.0.0.0 --api-key-file keys
FROM rust:1.95-alpine AS build
RUN apk add --no-cache bash gcc musl-dev bubblewrap binutils
COPY . /src
WORKDIR /src
RUN cargo build --release --locked -p hydralora \
    && install -D target/release/hydralora /out/hydralora

FROM alpine:3
# Programs that models write run in bubblewrap with Python: `hydralora eval --tasks humaneval`.
RUN apk add --no-cache bubblewrap ca-certificates python3 \
    && adduser -D -h /work hydralora
COPY --from=build /out/hydralora /usr/local/bin/hydralora
USER hydralora
WORKDIR /work
EXPOSE 8080
ENTRYPOINT ["hydralora"]
