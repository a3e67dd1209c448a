/* Model and arguments of the random programs that tests/it/abuse.rs generates.
 *
 * The model knows every handle ever seen and whether it is ours. Threads share it: a handle that is
 * ours when a call begins and when it ends cannot have been stale during the call; one that was
 * released before the call began cannot work. The lock is never held during a call. */
#ifndef ABUSE_H
#define ABUSE_H
#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <time.h>

#include "check.h"

#define LEN(array) (sizeof(array) / sizeof *(array))
#define MAX_THREADS 4
/* Handles of one program, and of one process. */
#define MAX_HANDLES 4096
#define MAX_EVER (1u << 22)
/* Requests of one program. */
#define MAX_REQUESTS 4096
#define MAX_IDS 64
#define PATIENCE_NS 60000000000

enum state { LIVE, RELEASING, DEAD };

struct handle {
    uint64_t raw;
    int kind;
    enum state state;
    /* Of a queue. */
    int accepted, completed;
};

/* A random number generator (SplitMix64). */
struct chance {
    uint64_t state;
};

struct thread {
    int number, steps;
    struct chance chance;
    /* Sections that this thread began. */
    uint64_t sections[8];
    int section_count;
    char trace[1 << 16];
    size_t trace_len;
    char buffer[4096];
    struct iovec segments[2];
    /* The handles of the call under way. */
    struct use {
        uint64_t raw;
        int kind;
        enum state before;
    } uses[8];
    int use_count;
    const char *name;
    pthread_t id;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct handle handles[MAX_HANDLES];
static int handle_count;
/* Every handle that the process ever had: open addressing. */
static uint64_t *ever;
static size_t ever_count;
static uint64_t recent[1024];
static uint64_t ids[MAX_IDS];
static int id_count;
/* Per request: whether its completion came. */
static atomic_int completed[MAX_REQUESTS];
static atomic_int request_count;
/* Targets of requests; they outlive every program. */
static _Alignas(4096) char memory[1 << 16];
static struct thread threads[MAX_THREADS];
static int thread_count;
static uint64_t program;
static atomic_ulong steps_done;
/* Calls by function: how many worked, how many were refused. */
static atomic_ulong worked[512], refused[512];

static uint64_t draw(struct chance *chance) {
    uint64_t z = chance->state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

static uint64_t below(struct thread *t, uint64_t end) {
    return draw(&t->chance) % end;
}

static int one_in(struct thread *t, uint64_t n) {
    return below(t, n) == 0;
}

static void note(struct thread *t, const char *format, ...) {
    va_list list;
    va_start(list, format);
    if (t->trace_len < sizeof t->trace - 256)
        t->trace_len += (size_t)vsnprintf(t->trace + t->trace_len, 256, format, list);
    va_end(list);
}

/* Says what the program did, and ends the process. */
static void fail(const char *format, ...) {
    va_list list;
    va_start(list, format);
    fprintf(stderr, "program %llu (%d threads): ", (unsigned long long)program, thread_count);
    vfprintf(stderr, format, list);
    va_end(list);
    fprintf(stderr, "\nlast error: %s\n", bds_error_message());
    for (int i = 0; i < thread_count; i++)
        fprintf(stderr, "thread %d, last in %s:\n%s\n", i, threads[i].name, threads[i].trace);
    abort();
}

/* The handle with this number, or NULL. Locked. */
static struct handle *find_handle(uint64_t raw) {
    for (int i = handle_count; i-- > 0;)
        if (handles[i].raw == raw)
            return &handles[i];
    return NULL;
}

/* Notes a number; fails if the process had it before. Locked. */
static void note_ever(uint64_t raw) {
    size_t at = (size_t)((raw * 0x9e3779b97f4a7c15) >> 42) % MAX_EVER;
    if (ever_count > MAX_EVER / 2) { /* a window: the oldest are forgotten */
        memset(ever, 0, MAX_EVER * sizeof *ever);
        ever_count = 0;
    }
    for (; ever[at] != 0; at = (at + 1) % MAX_EVER)
        if (ever[at] == raw)
            fail("handle %llx was given out twice", (unsigned long long)raw);
    ever[at] = raw;
    recent[ever_count++ % LEN(recent)] = raw;
}

/* A new handle is ours. */
static void made(struct thread *t, int kind, uint64_t raw) {
    pthread_mutex_lock(&lock);
    if (raw == 0)
        fail("%s returned no handle", t->name);
    note_ever(raw);
    if (handle_count == MAX_HANDLES)
        fail("too many handles in one program");
    handles[handle_count++] = (struct handle){.raw = raw, .kind = kind, .state = LIVE};
    pthread_mutex_unlock(&lock);
}

/* Any number: mostly a handle of the kind, sometimes another one, a forged one, or none. */
static uint64_t pick(struct thread *t, int kind) {
    uint64_t raw = 0;
    int found = 0, wants_live = !one_in(t, 4);
    pthread_mutex_lock(&lock);
    switch (below(t, 24)) {
    case 0:
        break;
    case 1:
        raw = draw(&t->chance);
        break;
    case 2:
        raw = handle_count ? handles[below(t, (uint64_t)handle_count)].raw : 0;
        break;
    case 3:
        /* Of an earlier program. */
        raw = recent[below(t, LEN(recent))];
        break;
    case 4:
        /* Forged. With several threads only such that nobody can be given meanwhile. */
        if (handle_count)
            raw = handles[below(t, (uint64_t)handle_count)].raw ^
                  ((uint64_t)1 << (thread_count > 1 ? 46 : below(t, 64)));
        break;
    default:
        /* The newest ones more often. */
        for (int i = handle_count; i-- > 0 && found < 8;)
            if (handles[i].kind == kind && (!wants_live || handles[i].state == LIVE)) {
                found++;
                if (one_in(t, (uint64_t)found))
                    raw = handles[i].raw;
            }
    }
    pthread_mutex_unlock(&lock);
    return raw;
}

static void begin(struct thread *t, const char *name) {
    t->use_count = 0;
    t->name = name;
}

/* The call to come uses this handle. */
static void use(struct thread *t, int kind, uint64_t raw) {
    struct handle *handle;
    struct use *one = &t->uses[t->use_count++];
    pthread_mutex_lock(&lock);
    handle = find_handle(raw);
    one->raw = raw;
    one->kind = kind;
    one->before = handle != NULL && handle->kind == kind ? handle->state : DEAD;
    pthread_mutex_unlock(&lock);
}

/* Another handle for the call, or one in eight times 0 where that is no handle but allowed. */
static uint64_t use_any(struct thread *t, int kind, int is_optional) {
    uint64_t raw = is_optional && one_in(t, 2) ? 0 : pick(t, kind);
    if (raw != 0 || !is_optional)
        use(t, kind, raw);
    return raw;
}

/* The call is one that releases its only handle. */
static void begin_release(struct thread *t) {
    struct handle *handle;
    pthread_mutex_lock(&lock);
    handle = find_handle(t->uses[0].raw);
    if (handle != NULL && handle->kind == t->uses[0].kind && handle->state == LIVE)
        handle->state = RELEASING;
    pthread_mutex_unlock(&lock);
}

static void end_release(struct thread *t, int code) {
    struct handle *handle;
    pthread_mutex_lock(&lock);
    handle = find_handle(t->uses[0].raw);
    if (code != BDS_OK && code != BDS_STILL_REFERENCED)
        fail("%s returned %d", t->name, code);
    if (handle == NULL || handle->state == DEAD)
        fail("%s released a handle that was not ours", t->name);
    handle->state = DEAD;
    pthread_mutex_unlock(&lock);
}

/* What must hold after every call. `is_weak`: it also names things by other means than handles.
 * Returns whether the call worked. */
static int end(struct thread *t, int function, int code, int is_weak) {
    int all_live = 1, any_dead = 0;
    char text[200];
    size_t len = 0;
    pthread_mutex_lock(&lock);
    text[0] = 0;
    for (int i = 0; i < t->use_count; i++) {
        struct use *one = &t->uses[i];
        struct handle *handle = find_handle(one->raw);
        int is_live = one->before == LIVE && handle != NULL && handle->state == LIVE;
        all_live &= is_live;
        any_dead |= one->before == DEAD;
        len += (size_t)snprintf(text + len, sizeof text - len, " %llx%s",
                                (unsigned long long)one->raw, is_live ? "" : "!");
    }
    pthread_mutex_unlock(&lock);
    note(t, "%s(%s) = %d %s\n", t->name, text, code, code < 0 ? bds_status_name(code) : "");
    if (code == BDS_ERR_PANIC || code == BDS_ERR_POISONED)
        fail("%s panicked", t->name);
    if (all_live && !is_weak && (code == BDS_ERR_STALE || code == BDS_ERR_KIND))
        fail("%s: a handle of ours is stale", t->name);
    if (any_dead && code >= 0)
        fail("%s worked with a handle that is not ours", t->name);
    atomic_fetch_add(code >= 0 ? &worked[function] : &refused[function], 1);
    return code >= 0;
}

static void add_id(struct thread *t, uint64_t id) {
    (void)t;
    pthread_mutex_lock(&lock);
    ids[id_count++ % MAX_IDS] = id;
    pthread_mutex_unlock(&lock);
}

static uint64_t any_id(struct thread *t) {
    uint64_t id;
    pthread_mutex_lock(&lock);
    id = id_count == 0 || one_in(t, 8) ? draw(&t->chance)
                                       : ids[below(t, id_count < MAX_IDS ? (uint64_t)id_count : MAX_IDS)];
    pthread_mutex_unlock(&lock);
    return id;
}

/* One of a list of strings, now and then one that fits nowhere. */
static const char *words(struct thread *t, const char *const *list, size_t count) {
    static const char *const odd[] = {NULL, "", "\xff", "nonsense", "{", "a=b", "n0"};
    return one_in(t, 12) ? odd[below(t, LEN(odd))] : list[below(t, count)];
}

static uint64_t any_offset(struct thread *t) {
    if (one_in(t, 16))
        return draw(&t->chance);
    return below(t, 140) * 512;
}

static uint32_t any_flags(struct thread *t) {
    switch (below(t, 6)) {
    case 0:
        return (uint32_t)1 << below(t, 7);
    case 1:
        return (uint32_t)draw(&t->chance);
    default:
        return 0;
    }
}

static int64_t any_timeout(struct thread *t) {
    return one_in(t, 4) ? (int64_t)below(t, 200000) : 0;
}

static struct iovec *any_segments(struct thread *t) {
    t->segments[0] = (struct iovec){t->buffer, 512 * below(t, 4)};
    t->segments[1] = (struct iovec){t->buffer + 2048, 512 * below(t, 4)};
    return t->segments;
}

/* Whether this thread holds a section up: then it must not wait for requests or for I/O. */
static int holds_section(struct thread *t) {
    return t->section_count > 0;
}

static void began_section(struct thread *t, uint64_t raw) {
    CHECK(t->section_count < (int)LEN(t->sections));
    t->sections[t->section_count++] = raw;
}

/* A request with a number of its own; its completion is counted. */
static bds_request any_request(struct thread *t, int kind_backend, int kind_memory, int kind_node) {
    bds_request request;
    int is_copy, number = atomic_fetch_add(&request_count, 1);
    memset(&request, 0, sizeof request);
    if (number >= MAX_REQUESTS)
        fail("too many requests in one program");
    request.opcode = one_in(t, 20) ? (uint32_t)below(t, 12) : 1 + (uint32_t)below(t, 7);
    request.flags = any_flags(t);
    request.backend.raw = use_any(t, kind_backend, 0);
    request.offset = any_offset(t);
    request.bytes = 512 * below(t, 5);
    request.user_data = (uint64_t)number;
    is_copy = request.opcode == BDS_OP_COPY_RANGE;
    if (is_copy) {
        request.target.raw = use_any(t, kind_backend, 0);
        request.target_offset = any_offset(t);
    }
    if (request.opcode == BDS_OP_READ || request.opcode == BDS_OP_WRITE) {
        char *place = memory + 512 * below(t, 100);
        if (one_in(t, 3)) {
            t->segments[0] = (struct iovec){place, (size_t)request.bytes};
            t->segments[1] = (struct iovec){place + 4096, 512};
            request.iov = t->segments;
            request.iovcnt = 2;
            request.bytes += 512;
        } else {
            request.buffer = place;
        }
        request.memory.raw = use_any(t, kind_memory, 1);
    }
    if (request.opcode == BDS_OP_BLOCK_STATUS) {
        request.buffer = memory + 4096 * below(t, 8);
        request.iovcnt = (uint32_t)below(t, 4);
        request.base.raw = use_any(t, kind_node, 1);
    }
    request.reserved[2] = one_in(t, 40);
    return request;
}

/* Counts completions of a queue, each once. */
static void took(struct thread *t, uint64_t queue, const bds_completion *done, int count) {
    struct handle *handle;
    for (int i = 0; i < count; i++) {
        uint64_t number = done[i].user_data;
        if (number >= (uint64_t)atomic_load(&request_count) ||
            atomic_fetch_add(&completed[number], 1) != 0)
            fail("%s: the completion of request %llu came twice", t->name,
                 (unsigned long long)number);
        if (done[i].status == BDS_ERR_PANIC || done[i].status == BDS_ERR_POISONED)
            fail("%s: a request panicked", t->name);
    }
    pthread_mutex_lock(&lock);
    if ((handle = find_handle(queue)) != NULL)
        handle->completed += count;
    pthread_mutex_unlock(&lock);
}

static void accepted(struct thread *t, uint64_t queue, int count) {
    struct handle *handle;
    (void)t;
    pthread_mutex_lock(&lock);
    if ((handle = find_handle(queue)) != NULL)
        handle->accepted += count;
    pthread_mutex_unlock(&lock);
}

static int entries(const char *path) {
    DIR *dir = opendir(path);
    int count = 0;
    CHECK(dir != NULL);
    while (readdir(dir) != NULL)
        count++;
    closedir(dir);
    return count;
}

/* Blocks of malloc that are in use, or 0 where a sanitizer has its own malloc. */
static long blocks_in_use(void);

struct rest {
    int descriptors, threads;
    long blocks;
};

static struct rest rest(void) {
    struct rest found = {entries("/proc/self/fd"), entries("/proc/self/task"), blocks_in_use()};
    return found;
}

/* Waits until there is not more than before: nodes and threads end in the background. */
static void nothing_is_left(struct rest before, long programs) {
    struct rest now;
    struct timespec pause = {0, 1000000};
    /* Workers of the library may begin late; what every program leaves is far more. */
    const int late = 4;
    long blocks = before.blocks + 800 + programs / 20;
    for (int round = 0; round < 30000; round++) {
        now = rest();
        if (now.descriptors <= before.descriptors + late &&
            now.threads <= before.threads + late && now.blocks <= blocks)
            return;
        nanosleep(&pause, NULL);
    }
    if (system("cat /proc/$PPID/task/*/comm >&2") != 0)
        fprintf(stderr, "the threads have no names\n");
    fail("left: %d descriptors (%d), %d threads (%d), %ld blocks (%ld)", now.descriptors,
         before.descriptors, now.threads, before.threads, now.blocks, before.blocks);
}

/* Fails when a program does not go on. */
static void *watch(void *argument) {
    unsigned long last = 0;
    int still = 0;
    (void)argument;
    for (;;) {
        unsigned long now = atomic_load(&steps_done);
        struct timespec second = {1, 0};
        nanosleep(&second, NULL);
        still = now == last ? still + 1 : 0;
        last = now;
        if (still == 90)
            fail("no step for %d seconds", still);
    }
    return NULL;
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || defined(NO_BLOCK_COUNT)
static long blocks_in_use(void) {
    return 0;
}
#else
/* glibc's own functions, counted. */
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t),
    *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);
static atomic_long blocks;

static void *counted(void *place) {
    if (place != NULL)
        atomic_fetch_add_explicit(&blocks, 1, memory_order_relaxed);
    return place;
}

void *malloc(size_t size) {
    return counted(__libc_malloc(size));
}

void *calloc(size_t count, size_t size) {
    return counted(__libc_calloc(count, size));
}

void *memalign(size_t alignment, size_t size);
void *memalign(size_t alignment, size_t size) {
    return counted(__libc_memalign(alignment, size));
}

void *aligned_alloc(size_t alignment, size_t size) {
    return memalign(alignment, size);
}

int posix_memalign(void **out, size_t alignment, size_t size) {
    void *place = memalign(alignment, size);
    if (place == NULL)
        return ENOMEM;
    *out = place;
    return 0;
}

void free(void *place) {
    if (place != NULL)
        atomic_fetch_sub_explicit(&blocks, 1, memory_order_relaxed);
    __libc_free(place);
}

void *realloc(void *place, size_t size) {
    if (place == NULL)
        return malloc(size);
    return __libc_realloc(place, size);
}

static long blocks_in_use(void) {
    return atomic_load(&blocks);
}
#endif
#endif
