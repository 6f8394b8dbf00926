/* Engines for the gateway benchmark: one thread serves several ports, answers at once, streams on a timer.
 *
 *   engine --ports 9001,9002 [--interval-ms 20] [--model bench]
 *
 * A POST is answered with a fixed chat completion; with `"stream":true` in its body by `max_tokens` events, one every interval, each
 * with the time of its sending inside (see MARK). A prompt that holds "IDLE" and a stream: one event, then silence for `max_tokens`
 * intervals, then the end. GETs answer what routers ask: /health, /v1/models, /metrics, /version.
 */
#include "http.h"

#define MAX_FD 70000
#define READ_BYTES (256 * 1024)

typedef struct {
    int fd;
    int listening;
    char *in; /* what came of a request that is not complete */
    size_t length, capacity;
    /* the stream under way */
    int pieces_left, idle, usage;
    int64_t due_ns;
    int heap_at; /* -1: not streaming */
} conn;

static conn *conns[MAX_FD];
static conn *heap[MAX_FD];
static int heap_size;
static int64_t interval_ns = 20000000;
static const char *model = "bench";
static int loop_fd;
static char unary[2048], models[512];
static size_t unary_length, models_length;

/* ---- a heap of streams by the time of their next piece */

static void place(int at, conn *c) {
    heap[at] = c;
    c->heap_at = at;
}

static void sift_up(int at) {
    conn *c = heap[at];
    while (at && heap[(at - 1) / 2]->due_ns > c->due_ns) {
        place(at, heap[(at - 1) / 2]);
        at = (at - 1) / 2;
    }
    place(at, c);
}

static void sift_down(int at) {
    conn *c = heap[at];
    for (;;) {
        int child = 2 * at + 1;
        if (child >= heap_size) break;
        if (child + 1 < heap_size && heap[child + 1]->due_ns < heap[child]->due_ns) child++;
        if (heap[child]->due_ns >= c->due_ns) break;
        place(at, heap[child]);
        at = child;
    }
    place(at, c);
}

static void heap_add(conn *c) {
    heap[heap_size] = c;
    c->heap_at = heap_size++;
    sift_up(c->heap_at);
}

static void heap_remove(conn *c) {
    int at = c->heap_at;
    if (at < 0) return;
    c->heap_at = -1;
    conn *last = heap[--heap_size];
    if (at == heap_size) return;
    place(at, last);
    sift_up(at);
    sift_down(last->heap_at);
}

/* ---- answers */

static void drop(conn *c) {
    heap_remove(c);
    close(c->fd);
    conns[c->fd] = NULL;
    free(c->in);
    free(c);
}

/* Small answers always fit into a socket's empty buffer; a client that does not read its stream is dropped. */
static int put(conn *c, const char *data, size_t length) {
    ssize_t n = send(c->fd, data, length, MSG_NOSIGNAL);
    if (n == (ssize_t)length) return 1;
    drop(c);
    return 0;
}

static int put_chunk(conn *c, const char *head, const char *event, int length) {
    char out[2048];
    int n = snprintf(out, sizeof out, "%s%x\r\n%.*s\r\n", head, length, length, event);
    return put(c, out, n);
}

static const char *stream_head =
    "HTTP/1.1 200 OK\r\ndate: Tue, 24 Nov 2026 00:00:00 GMT\r\nserver: uvicorn\r\n"
    "content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";

static int put_piece(conn *c, const char *head) {
    char event[512];
    int n = snprintf(event, sizeof event,
                     "data: {\"id\":\"chatcmpl-0123456789abcdef0123456789abcdef\",\"object\":\"chat.completion.chunk\","
                     "\"created\":1764000000,\"model\":\"%s\",\"choices\":[{\"index\":0,\"delta\":{" MARK "%019lld\"},"
                     "\"logprobs\":null,\"finish_reason\":null}]}\n\n",
                     model, (long long)now_ns());
    return put_chunk(c, head, event, n);
}

static int put_end(conn *c) {
    char event[512];
    if (c->usage) {
        int n = snprintf(event, sizeof event,
                         "data: {\"id\":\"chatcmpl-0123456789abcdef0123456789abcdef\",\"object\":\"chat.completion.chunk\","
                         "\"created\":1764000000,\"model\":\"%s\",\"choices\":[],\"usage\":{\"prompt_tokens\":50,"
                         "\"total_tokens\":60,\"completion_tokens\":10}}\n\n",
                         model);
        if (!put_chunk(c, "", event, n)) return 0;
    }
    return put(c, "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n", 24);
}

static void advance(conn *c) {
    if (c->pieces_left > 0 && !c->idle) {
        c->pieces_left--;
        if (put_piece(c, "")) {
            c->due_ns += interval_ns;
            sift_down(c->heap_at);
        }
        return;
    }
    heap_remove(c);
    put_end(c);
}

static int answer_get(conn *c, const char *path) {
    char out[4096];
    int n;
    if (!strncmp(path, "/v1/models", 10)) return put(c, models, models_length);
    if (!strncmp(path, "/health", 7) || !strncmp(path, "/ping", 5))
        return put(c, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 38);
    if (!strncmp(path, "/version", 8)) {
        n = snprintf(out, sizeof out, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 20\r\n\r\n{\"version\":\"0.32.0\"}");
        return put(c, out, n);
    }
    if (!strncmp(path, "/metrics", 8)) {
        char page[2048];
        int m = snprintf(page, sizeof page,
                         "vllm:num_requests_running{engine=\"0\",model_name=\"%s\"} %d.0\n"
                         "vllm:num_requests_waiting{engine=\"0\",model_name=\"%s\"} 0.0\n"
                         "vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"%s\"} 0.1\n"
                         "vllm:prefix_cache_queries_total 0.0\nvllm:prefix_cache_hits_total 0.0\nvllm:num_preemptions_total 0.0\n"
                         "vllm:prompt_tokens_total 0.0\nvllm:generation_tokens_total 0.0\n"
                         "vllm:cache_config_info{block_size=\"16\",enable_prefix_caching=\"True\",num_gpu_blocks=\"8192\"} 1.0\n",
                         model, heap_size, model, model);
        n = snprintf(out, sizeof out, "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: %d\r\n\r\n%s", m, page);
        return put(c, out, n);
    }
    if (!strncmp(path, "/v1/chat/completions", 20) || !strncmp(path, "/v1/completions", 15))
        return put(c, "HTTP/1.1 405 Method Not Allowed\r\ncontent-length: 0\r\n\r\n", 54);
    return put(c, "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", 45);
}

static int answer_post(conn *c, const char *body, size_t length) {
    if (!memmem(body, length, "\"stream\":true", 13) && !memmem(body, length, "\"stream\": true", 14))
        return put(c, unary, unary_length);
    const char *most = memmem(body, length, "\"max_tokens\":", 13);
    c->pieces_left = most ? atoi(most + 13) : 16;
    c->idle = memmem(body, length, "IDLE", 4) != NULL;
    c->usage = memmem(body, length, "\"include_usage\":true", 20) != NULL;
    c->due_ns = now_ns() + (c->idle ? interval_ns * c->pieces_left : interval_ns);
    c->pieces_left--;
    if (!put_piece(c, stream_head)) return 0;
    heap_add(c);
    return 1;
}

/* One request at the front of `data`: bytes used, 0 when it is not complete, -1 when the connection is gone. */
static long serve_one(conn *c, const char *data, size_t length) {
    const char *head_end = memmem(data, length < 65536 ? length : 65536, "\r\n\r\n", 4);
    if (!head_end) return 0;
    size_t head = head_end + 4 - data;
    if (data[0] == 'G') return answer_get(c, data + 4) ? (long)head : -1;
    long body = header_number(data, head, "content-length");
    if (body < 0) body = 0;
    if (length < head + body) return 0;
    return answer_post(c, data + head, body) ? (long)(head + body) : -1;
}

static void feed(conn *c, const char *data, size_t length) {
    if (c->length) {
        if (c->length + length > c->capacity) {
            c->capacity = 2 * (c->length + length);
            c->in = realloc(c->in, c->capacity);
        }
        memcpy(c->in + c->length, data, length);
        c->length += length;
        data = c->in;
        length = c->length;
    }
    size_t used = 0;
    while (used < length) {
        long n = serve_one(c, data + used, length - used);
        if (n < 0) return;
        if (n == 0) break;
        used += n;
    }
    size_t left = length - used;
    if (left && left > c->capacity) {
        c->capacity = 2 * left + 65536;
        char *fresh = malloc(c->capacity);
        memcpy(fresh, data + used, left);
        free(c->in);
        c->in = fresh;
    } else if (left) {
        memmove(c->in, data + used, left);
    }
    c->length = left;
}

static void readable(conn *c, char *buffer) {
    ssize_t n = recv(c->fd, buffer, READ_BYTES, 0);
    if (n > 0)
        feed(c, buffer, n);
    else if (n == 0 || (errno != EAGAIN && errno != EINTR))
        drop(c);
}

static void watch(int fd, int listening) {
    if (fd >= MAX_FD) {
        close(fd);
        return;
    }
    conn *c = calloc(1, sizeof *c);
    c->fd = fd;
    c->listening = listening;
    c->heap_at = -1;
    conns[fd] = c;
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    epoll_ctl(loop_fd, EPOLL_CTL_ADD, fd, &event);
}

static void listen_on(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 4096)) die("bind");
    watch(fd, 1);
}

int main(int argc, char **argv) {
    const char *ports = "9001";
    for (int k = 1; k + 1 < argc; k += 2) {
        if (!strcmp(argv[k], "--ports")) ports = argv[k + 1];
        if (!strcmp(argv[k], "--interval-ms")) interval_ns = (int64_t)(atof(argv[k + 1]) * 1e6);
        if (!strcmp(argv[k], "--model")) model = argv[k + 1];
    }
    raise_descriptor_limit();
    char body[1024];
    int n = snprintf(body, sizeof body,
                     "{\"id\":\"chatcmpl-0123456789abcdef0123456789abcdef\",\"object\":\"chat.completion\",\"created\":1764000000,"
                     "\"model\":\"%s\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":"
                     "\"Forty-two is the answer, and it took a while.\",\"refusal\":null,\"tool_calls\":[]},\"logprobs\":null,"
                     "\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":50,\"total_tokens\":60,\"completion_tokens\":10}}",
                     model);
    unary_length = snprintf(unary, sizeof unary,
                            "HTTP/1.1 200 OK\r\ndate: Tue, 24 Nov 2026 00:00:00 GMT\r\nserver: uvicorn\r\ncontent-length: %d\r\n"
                            "content-type: application/json\r\n\r\n%s",
                            n, body);
    n = snprintf(body, sizeof body,
                 "{\"object\":\"list\",\"data\":[{\"id\":\"%s\",\"object\":\"model\",\"created\":1,\"owned_by\":\"bench\","
                 "\"root\":\"%s\",\"parent\":null,\"max_model_len\":131072}]}",
                 model, model);
    models_length = snprintf(models, sizeof models, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s", n, body);
    loop_fd = epoll_create1(0);
    for (char *copy = strdup(ports), *port = strtok(copy, ","); port; port = strtok(NULL, ",")) listen_on(atoi(port));
    printf("ready\n");
    fflush(stdout);
    char *buffer = malloc(READ_BYTES);
    struct epoll_event events[512];
    for (;;) {
        int wait_ms = -1;
        if (heap_size) {
            int64_t left = heap[0]->due_ns - now_ns();
            wait_ms = left <= 0 ? 0 : (int)((left + 999999) / 1000000);
        }
        int found = epoll_wait(loop_fd, events, 512, wait_ms);
        for (int k = 0; k < found; k++) {
            conn *c = conns[events[k].data.fd];
            if (!c) continue;
            if (c->listening) {
                int fd;
                while ((fd = accept4(c->fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    no_delay(fd);
                    watch(fd, 0);
                }
            } else {
                readable(c, buffer);
            }
        }
        int64_t now = now_ns();
        while (heap_size && heap[0]->due_ns <= now) advance(heap[0]);
    }
}
