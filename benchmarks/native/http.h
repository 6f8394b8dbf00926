/* What the engine and the load client of the benchmark share: time, sockets, small searches. */
#ifndef BENCH_HTTP_H
#define BENCH_HTTP_H

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* what stands before the sending time (19 digits, ns) in a streamed piece of text */
#define MARK "\"content\":\"@"
#define MARK_DIGITS 19

static inline int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000LL + t.tv_nsec;
}

static inline void die(const char *what) {
    perror(what);
    exit(1);
}

static inline void no_delay(int fd) {
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

static inline void raise_descriptor_limit(void) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

/* The value of `content-length` in a head; -1 where there is none. `name` must be in lower case. */
static inline long header_number(const char *head, size_t length, const char *name) {
    size_t n = strlen(name);
    for (const char *at = head, *end = head + length; at + n < end; at++) {
        if ((at == head || at[-1] == '\n') && !strncasecmp(at, name, n) && at[n] == ':')
            return strtol(at + n + 1, NULL, 10);
    }
    return -1;
}

#endif
