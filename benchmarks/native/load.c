/* The load client of the gateway benchmark: one thread, epoll, HTTP/1.1 keep-alive.
 *
 *   load --port 8080 --mode closed  --connections 32            a request behind each answer, on each connection
 *   load --port 8080 --mode open    --rate 100 [--stream 1]     requests at fixed times; latency counts from the time due
 *   load --port 8080 --mode streams --connections 200           that many streams running, each followed by the next
 *   load --port 8080 --mode hold    --connections 1000          that many streams, opened once and read to their end
 *
 * Also: --prompt-bytes N, --tokens N (events a stream), --idle 1, --prompts N (distinct ones), --warmup-s S, --duration-s S, --key K.
 * Prints "measuring" and "measured" around the measured time ("hold": around the time in which all are open), then a line of JSON.
 * A refused request (503 and the like) counts as refused, an answer that breaks off as broken.
 */
#include "http.h"

#define READ_BYTES (256 * 1024)
#define KEPT 96 /* bytes of the last read kept, for a mark that two reads split */

enum { CONNECTING, IDLE, SENDING, HEAD, BODY };

typedef struct {
    int fd, state, chunked, failed_status, started;
    long body_left;       /* of a body with a length, or of the present chunk */
    int chunk_state;      /* 0 size line, 1 data, 2 line end behind data, 3 last lines */
    long chunk_size;
    char *out;
    size_t sent;
    char head[8192];
    size_t head_length;
    char kept[KEPT];
    size_t kept_length;
    int64_t due_ns;       /* when its request was due */
} conn;

typedef struct {
    float *values;
    size_t count, room;
} samples;

static samples latency, first, delays;
static long done, broken, refused, chunks, opened;
static int64_t measure_from, measure_to;
static char *request_text;
static size_t request_length;
static int prompt_at, prompts = 64;
static long prompt_number;
static int loop_fd, port = 8080, stream, hold, connections = 1;
static conn **idle;
static int idle_count;
static long live;

static void add(samples *s, double us) {
    if (s->count == s->room) {
        s->room = s->room ? 2 * s->room : 65536;
        s->values = realloc(s->values, s->room * sizeof(float));
    }
    s->values[s->count++] = (float)us;
}

static int by_value(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void print_quantiles(const char *name, samples *s) {
    qsort(s->values, s->count, sizeof(float), by_value);
    if (!s->count)
        printf(", \"%s\": null", name);
    else
        printf(", \"%s\": {\"p50\": %.1f, \"p90\": %.1f, \"p99\": %.1f, \"max\": %.1f}", name, s->values[s->count / 2],
               s->values[s->count * 9 / 10], s->values[s->count * 99 / 100], s->values[s->count - 1]);
}

static int measured(int64_t now) { return now >= measure_from && now < measure_to; }

static void interest(conn *c, uint32_t events, int op) {
    struct epoll_event event = {.events = events, .data.ptr = c};
    epoll_ctl(loop_fd, op, c->fd, &event);
}

static conn *connect_one(void) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (fd < 0) die("socket");
    no_delay(fd);
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (connect(fd, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS) die("connect");
    conn *c = calloc(1, sizeof *c);
    c->fd = fd;
    c->state = CONNECTING;
    live++;
    interest(c, EPOLLIN | EPOLLOUT, EPOLL_CTL_ADD);
    return c;
}

static void hang_up(conn *c) {
    close(c->fd);
    c->fd = -1;
    live--;
    /* freed never: a few events of this round may still name it */
}

static void write_on(conn *c) {
    while (c->sent < request_length) {
        ssize_t n = send(c->fd, c->out + c->sent, request_length - c->sent, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno != EAGAIN && errno != EINTR) break;
            interest(c, EPOLLIN | EPOLLOUT, EPOLL_CTL_MOD);
            return;
        }
        c->sent += n;
    }
    interest(c, EPOLLIN, EPOLL_CTL_MOD);
    c->state = HEAD;
}

/* All connections share one text; what differs is written into it just before it is sent whole. A longer one has a copy of its own. */
static void ask(conn *c, int64_t due_ns) {
    char number[16];
    snprintf(number, sizeof number, "%08ld", prompt_number++ % prompts);
    memcpy(request_text + prompt_at, number, 8);
    if (request_length > 16384 && c->out == NULL) c->out = malloc(request_length);
    if (request_length > 16384)
        memcpy(c->out, request_text, request_length);
    else
        c->out = request_text;
    c->state = SENDING;
    c->sent = c->head_length = c->kept_length = 0;
    c->started = c->chunked = c->failed_status = 0;
    c->due_ns = due_ns;
    write_on(c);
}

static void ended(conn *c, int64_t now) {
    if (c->failed_status)
        refused += hold || measured(now);
    else if (hold || measured(now)) {
        done++;
        if (!stream) add(&latency, (now - c->due_ns) / 1000.0);
    }
    c->state = IDLE;
}

/* Times inside the events; a mark may be split between two reads. */
static void scan(conn *c, const char *data, size_t length, int64_t now) {
    char joined[2 * KEPT];
    if (c->kept_length) {
        size_t more = length < KEPT ? length : KEPT;
        memcpy(joined, c->kept, c->kept_length);
        memcpy(joined + c->kept_length, data, more);
        size_t all = c->kept_length + more;
        const char *at = memmem(joined, all, MARK, sizeof MARK - 1);
        if (at && (size_t)(at - joined) < c->kept_length && (size_t)(at - joined) + sizeof MARK - 1 + MARK_DIGITS <= all &&
            (size_t)(at - joined) + sizeof MARK - 1 + MARK_DIGITS > c->kept_length) {
            if (measured(now)) {
                chunks++;
                add(&delays, (now - strtoll(at + sizeof MARK - 1, NULL, 10)) / 1000.0);
            }
        }
    }
    const char *from = data, *end = data + length, *at;
    while ((at = memmem(from, end - from, MARK, sizeof MARK - 1)) && at + sizeof MARK - 1 + MARK_DIGITS <= end) {
        if (measured(now)) {
            chunks++;
            add(&delays, (now - strtoll(at + sizeof MARK - 1, NULL, 10)) / 1000.0);
        }
        from = at + sizeof MARK - 1 + MARK_DIGITS;
    }
    c->kept_length = (size_t)(end - from) < KEPT - 1 ? (size_t)(end - from) : KEPT - 1;
    memcpy(c->kept, end - c->kept_length, c->kept_length);
}

/* Bytes used of a chunked body; sets *over at its end. */
static size_t read_chunked(conn *c, const char *data, size_t length, int *over) {
    size_t at = 0;
    while (at < length) {
        if (c->chunk_state == 1) {
            size_t n = length - at < (size_t)c->body_left ? length - at : (size_t)c->body_left;
            at += n;
            c->body_left -= n;
            if (!c->body_left) c->chunk_state = 2;
        } else {
            char byte = data[at++];
            if (c->chunk_state == 0) {
                if (byte == '\n') {
                    c->body_left = c->chunk_size;
                    c->chunk_state = c->chunk_size ? 1 : 3;
                    c->chunk_size = 0;
                } else if (isxdigit((unsigned char)byte)) {
                    c->chunk_size = c->chunk_size * 16 + (isdigit((unsigned char)byte) ? byte - '0' : tolower(byte) - 'a' + 10);
                }
            } else if (byte == '\n') {
                if (c->chunk_state == 3) {
                    *over = 1;
                    return at;
                }
                c->chunk_state = 0;
            }
        }
    }
    return at;
}

static void take(conn *c, const char *data, size_t length, int64_t now) {
    if (c->state == HEAD || c->state == SENDING) {
        size_t more = length < sizeof c->head - c->head_length ? length : sizeof c->head - c->head_length;
        memcpy(c->head + c->head_length, data, more);
        size_t before = c->head_length;
        c->head_length += more;
        char *end = memmem(c->head, c->head_length, "\r\n\r\n", 4);
        if (!end) return;
        size_t head = end + 4 - c->head;
        c->failed_status = strncmp(c->head + 9, "200", 3) != 0;
        c->body_left = header_number(c->head, head, "content-length");
        c->chunked = c->body_left < 0;
        if (c->chunked) c->chunk_state = 0, c->chunk_size = 0, c->body_left = 0;
        c->state = BODY;
        data += head - before;
        length -= head - before;
    }
    if (c->state != BODY) return;
    int over = 0;
    if (c->chunked)
        read_chunked(c, data, length, &over);
    else {
        c->body_left -= length;
        over = c->body_left <= 0;
    }
    if (stream && length && !c->failed_status) {
        if (!c->started) {
            c->started = 1;
            opened++;
            if (measured(now)) add(&first, (now - c->due_ns) / 1000.0);
        }
        scan(c, data, length, now);
    }
    if (over) ended(c, now);
}

static void lost(conn *c) {
    if (c->state != IDLE && c->state != CONNECTING) {
        if (c->failed_status) refused++;
        else broken++;
    } else if (c->state == CONNECTING) {
        broken++;
    }
    hang_up(c);
}

static void next_for(conn *c, int64_t now, int again) {
    if (again)
        ask(c, now);
    else
        idle[idle_count++] = c;
}

static void make_request(int prompt_bytes, int tokens, int idle_stream, const char *key) {
    char *content = malloc(prompt_bytes + 1), *body = malloc(prompt_bytes + 512);
    for (int k = 0; k < prompt_bytes; k++) content[k] = "the quick brown fox jumps over a lazy dog "[k % 42];
    content[prompt_bytes] = 0;
    int lead = idle_stream ? 12 : 8;
    memcpy(content, idle_stream ? "00000000IDLE" : "00000000", prompt_bytes < lead ? prompt_bytes : lead);
    int n = sprintf(body, "{\"model\":\"bench\",\"max_tokens\":%d%s,\"messages\":[{\"role\":\"user\",\"content\":\"%s\"}]}", tokens,
                    stream ? ",\"stream\":true" : "", content);
    request_text = malloc(n + 1024);
    request_length = sprintf(request_text,
                             "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:%d\r\nuser-agent: bench\r\naccept: */*\r\n"
                             "content-type: application/json\r\nauthorization: Bearer %s\r\ncontent-length: %d\r\n\r\n",
                             port, key, n);
    memcpy(request_text + request_length, body, n);
    prompt_at = (int)(request_length + (strstr(body, "\"content\":\"") - body) + 11);
    request_length += n;
}

int main(int argc, char **argv) {
    double warmup_s = 1, duration_s = 3, rate = 0;
    int prompt_bytes = 200, tokens = 16, idle_stream = 0;
    const char *mode = "closed", *key = "none";
    for (int k = 1; k + 1 < argc; k += 2) {
        const char *name = argv[k], *value = argv[k + 1];
        if (!strcmp(name, "--port")) port = atoi(value);
        else if (!strcmp(name, "--mode")) mode = value;
        else if (!strcmp(name, "--connections")) connections = atoi(value);
        else if (!strcmp(name, "--rate")) rate = atof(value);
        else if (!strcmp(name, "--stream")) stream = atoi(value);
        else if (!strcmp(name, "--prompt-bytes")) prompt_bytes = atoi(value);
        else if (!strcmp(name, "--tokens")) tokens = atoi(value);
        else if (!strcmp(name, "--idle")) idle_stream = atoi(value);
        else if (!strcmp(name, "--prompts")) prompts = atoi(value);
        else if (!strcmp(name, "--warmup-s")) warmup_s = atof(value);
        else if (!strcmp(name, "--duration-s")) duration_s = atof(value);
        else if (!strcmp(name, "--key")) key = value;
        else return fprintf(stderr, "unknown option %s\n", name), 2;
    }
    int open_loop = !strcmp(mode, "open"), streams = !strcmp(mode, "streams");
    hold = !strcmp(mode, "hold");
    if (streams || hold) stream = 1;
    raise_descriptor_limit();
    make_request(prompt_bytes, tokens, idle_stream, key);
    loop_fd = epoll_create1(0);
    idle = calloc(100000, sizeof *idle);
    int64_t begin = now_ns(), next_due = begin, all_open_ns = 0;
    measure_from = begin + (int64_t)(warmup_s * 1e9);
    measure_to = measure_from + (int64_t)(duration_s * 1e9);
    if (hold) measure_from = begin, measure_to = INT64_MAX;
    int64_t gap = open_loop ? (int64_t)(1e9 / rate) : 0;
    long made = 0, said = 0;
    char *buffer = malloc(READ_BYTES);
    struct epoll_event events[512];
    for (;;) {
        int64_t now = now_ns();
        if (!hold && said == 0 && now >= measure_from) said = 1, puts("measuring"), fflush(stdout);
        if (!hold && now >= measure_to) break;
        if (hold && said == 0 && opened + refused + broken >= connections) {
            said = 1, all_open_ns = now;
            printf("measuring\n"), fflush(stdout);
        }
        if (hold && said == 1 && now - all_open_ns >= (int64_t)(duration_s * 1e9)) said = 2, puts("measured"), fflush(stdout);
        if (hold && said == 2 && done + refused + broken >= connections) break;
        /* connections are made a few at a time, so that nobody's backlog is what is measured */
        long pending = 0;
        while (!open_loop && made < connections && pending < 64 && now >= begin + made * (streams || hold ? 200000LL : 0)) {
            connect_one();
            made++, pending++;
        }
        while (open_loop && now >= next_due) {
            if (idle_count) ask(idle[--idle_count], next_due);
            else connect_one()->due_ns = next_due;
            next_due += gap;
        }
        int wait_ms = open_loop || made < connections ? 1 : 20;
        if (open_loop && next_due - now < 1000000) wait_ms = 0;
        int found = epoll_wait(loop_fd, events, 512, wait_ms);
        for (int k = 0; k < found; k++) {
            conn *c = events[k].data.ptr;
            if (c->fd < 0) continue;
            if (c->state == CONNECTING) {
                int error = 0;
                socklen_t size = sizeof error;
                getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
                if (error) lost(c);
                else ask(c, c->due_ns ? c->due_ns : now_ns());
                continue;
            }
            if (events[k].events & EPOLLOUT && c->state == SENDING) write_on(c);
            if (!(events[k].events & (EPOLLIN | EPOLLHUP | EPOLLERR))) continue;
            ssize_t n = recv(c->fd, buffer, READ_BYTES, 0);
            if (n > 0) {
                int64_t at = now_ns();
                take(c, buffer, n, at);
                if (c->state == IDLE) {
                    if (hold) hang_up(c);
                    else next_for(c, at, !open_loop);
                }
            } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
                lost(c);
                if (!open_loop && !hold) connect_one();
            }
        }
    }
    if (!hold) puts("measured"), fflush(stdout);
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    double cpu_s = usage.ru_utime.tv_sec + usage.ru_stime.tv_sec + (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
    printf("{\"done\": %ld, \"broken\": %ld, \"refused\": %ld, \"opened\": %ld, \"chunks\": %ld, \"wall_s\": %.3f, \"cpu_share\": %.3f",
           done, broken, refused, opened, chunks, duration_s, cpu_s / ((now_ns() - begin) / 1e9));
    print_quantiles("latency_us", &latency);
    print_quantiles("first_us", &first);
    print_quantiles("chunk_us", &delays);
    puts("}");
    return 0;
}
