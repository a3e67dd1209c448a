/* The world of the generated sweeps (tests/it/sweep.rs): one live handle of every kind, and what
 * counts cases and says which went wrong. */
#ifndef SWEEP_H
#define SWEEP_H
#include "check.h"

static int wrong, cases, live_calls, live_successes;
static _Alignas(4096) char bytes[4096], out[4096];
static struct iovec segment = {bytes, 512};

struct world {
    bds_context context;
    bds_options options;
    bds_iothread iothread;
    bds_node node, third, from, to;
    bds_job job;
    bds_backend backend;
    bds_change change;
    bds_section section;
    bds_queue queue;
    bds_memory memory;
    bds_request request;
    uint64_t node_id;
};
static struct world w;

static void make(struct world *one) {
    bds_node other;
    one->context = new_context();
    OK(bds_options_create(&one->options));
    OK(bds_iothread_create(one->context, "sweep", &one->iothread));
    one->node = new_disk(one->context, "driver=mem,size=1M,node-name=node");
    OK(bds_node_id(one->node, &one->node_id));
    OK(bds_bitmap_add(one->node, "bitmap", 0, 0));
    one->third = new_disk(one->context, "driver=mem,size=1M");
    /* A section on `node` would hold up every request. */
    OK(bds_graph_drain_begin(one->third, 0, -1, &one->section));
    other = new_disk(one->context, "driver=mem,size=1M");
    one->backend = new_writer(other);
    (void)bds_node_unref(other);
    OK(bds_change_create(one->context, &one->change));
    OK(bds_queue_create(one->context, NULL, &one->queue));
    OK(bds_memory_register(bytes, sizeof bytes, &one->memory));
    one->from = new_disk(one->context, "driver=mem,size=64k,node-name=from");
    one->to = new_disk(one->context, "driver=mem,size=64k,node-name=to");
    OK(bds_job_start(one->context, "mirror", "job-id=job,device=from,target=to", &one->job));
    memset(&one->request, 0, sizeof one->request);
    one->request.opcode = BDS_OP_FLUSH;
    one->request.backend = one->backend;
}

/* Releases what a case has left. */
static void end(struct world *one) {
    (void)bds_graph_drain_end(one->section);
    (void)bds_job_cancel(one->job, 1);
    (void)bds_job_wait(one->job, NULL, -1);
    (void)bds_job_unref(one->job);
    (void)bds_node_unref(one->from);
    (void)bds_node_unref(one->to);
    (void)bds_options_unref(one->options);
    (void)bds_iothread_unref(one->iothread);
    (void)bds_change_unref(one->change);
    (void)bds_queue_unref(one->queue);
    (void)bds_memory_unref(one->memory);
    (void)bds_backend_unref(one->backend);
    (void)bds_node_unref(one->node);
    (void)bds_node_unref(one->third);
    (void)bds_context_unref(one->context);
}

static void anew(void) {
    end(&w);
    make(&w);
}

static void said_wrong(const char *call, int found, const char *wanted) {
    fprintf(stderr, "%s: %d (%s), not %s\n  %s\n", call, found, bds_status_name(found), wanted,
            found < 0 ? bds_error_message() : "");
    wrong++;
}

/* The call returns this code. */
#define EXPECT(wanted, call)                                                              \
    do {                                                                                  \
        int found_ = (call);                                                              \
        cases++;                                                                          \
        if (found_ != (int)(wanted))                                                      \
            said_wrong(#call, found_, #wanted);                                           \
    } while (0)

/* The call may work, and then changes the world; it does not return this code. */
#define EXPECT_NOT(code, call)                                                            \
    do {                                                                                  \
        int found_;                                                                       \
        anew();                                                                           \
        found_ = (call);                                                                  \
        cases++;                                                                          \
        if (found_ == (int)(code) || found_ == BDS_ERR_PANIC)                             \
            said_wrong(#call, found_, "anything but " #code);                             \
    } while (0)

/* With live handles and arguments that fit: success, an errno, or a status that the function's
 * documentation names. */
#define EXPECT_DOCUMENTED(call, ...)                                                      \
    do {                                                                                  \
        static const int named_[] = {0, __VA_ARGS__};                                     \
        int found_, is_named_ = 0;                                                        \
        anew();                                                                           \
        found_ = (call);                                                                  \
        cases++;                                                                          \
        live_calls++;                                                                     \
        live_successes += found_ >= 0;                                                    \
        for (size_t i_ = 0; i_ < sizeof named_ / sizeof *named_; i_++)                    \
            is_named_ |= found_ == named_[i_];                                            \
        if (found_ < -4095 && !is_named_)                                                 \
            said_wrong(#call, found_, "a code of its documentation");                     \
    } while (0)

/* Makes the library panic at a point, of which it passes some first; only in builds with debug
 * assertions. Returns whether the point before was never reached. */
#ifdef __cplusplus
extern "C"
#endif
extern int bds_test_panic_at(const char *point, uint64_t skip) __attribute__((weak));
static int panics, poisonings;

/* The call panics at the point; then it is refused for what it worked on, or works. */
#define EXPECT_PANIC(point, skip, call)                                                   \
    do {                                                                                  \
        int found_;                                                                       \
        if (bds_test_panic_at == NULL)                                                    \
            break;                                                                        \
        anew();                                                                           \
        (void)bds_test_panic_at(point, skip);                                             \
        found_ = (call);                                                                  \
        if (bds_test_panic_at("", 0))                                                     \
            break; /* It does not come to that point. */                                  \
        cases++;                                                                          \
        panics++;                                                                         \
        if (found_ != BDS_ERR_PANIC || strstr(bds_error_message(), "injected") == NULL)   \
            said_wrong(point ": " #call, found_, "BDS_ERR_PANIC");                        \
        found_ = (call);                                                                  \
        poisonings += found_ == BDS_ERR_POISONED;                                         \
        if (found_ == BDS_ERR_PANIC || found_ == BDS_ERR_STALE)                           \
            said_wrong(point ", again: " #call, found_, "success or BDS_ERR_POISONED");   \
        anew();                                                                           \
    } while (0)

/* A struct that begins with its size, and what a later version might have behind it. */
#define SIZED(type, init)                                                                 \
    static struct type##_and_tail {                                                       \
        type known;                                                                       \
        uint64_t tail[4];                                                                 \
    } type##_later;                                                                       \
    static type *type##_with(size_t size, uint64_t tail) {                                \
        static const type initial = init;                                                 \
        memset(&type##_later, 0, sizeof type##_later);                                    \
        type##_later.known = initial;                                                     \
        type##_later.known.struct_size = size;                                            \
        type##_later.tail[3] = tail;                                                      \
        return &type##_later.known;                                                       \
    }                                                                                     \
    static type *type##_fit(void) {                                                       \
        return type##_with(sizeof(type), 0);                                              \
    }

#endif
