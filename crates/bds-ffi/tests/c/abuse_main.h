/* Runs the random programs: FIRST COUNT THREADS. Behind the generated calls; see abuse.h. */
#ifndef ABUSE_MAIN_H
#define ABUSE_MAIN_H

/* A section of this thread's own that another one has ended holds nothing up any more. */
static void forget_ended_sections(struct thread *t) {
    int kept = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < t->section_count; i++) {
        struct handle *handle = find_handle(t->sections[i]);
        if (handle != NULL && handle->state == LIVE)
            t->sections[kept++] = t->sections[i];
    }
    t->section_count = kept;
    pthread_mutex_unlock(&lock);
}

/* A call, of one that makes something while the program is young. */
static void step(struct thread *t, int is_young) {
    int at = is_young ? makers[below(t, LEN(makers))] : table[below(t, LEN(table))];
    const struct call *call = &calls[at];
    forget_ended_sections(t);
    atomic_fetch_add(&steps_done, 1);
    if (call->waits && holds_section(t) && !call->has_timeout)
        return;
    if (call->makes_section && t->section_count == 2)
        return;
    if (call->one_in > 1 && !one_in(t, (uint64_t)call->one_in))
        return;
    call->call(t, at);
}

static void release(struct thread *t, int kind, uint64_t raw) {
    begin(t, calls[release_of[kind]].name);
    use(t, kind, raw);
    begin_release(t);
    int code = release_raw(kind, raw);
    if (end(t, release_of[kind], code, 0))
        end_release(t, code);
}

static void *work(void *argument) {
    struct thread *t = argument;
    for (int i = 0; i < t->steps; i++)
        step(t, i < t->steps / 4);
    /* Others' requests wait for its sections. */
    forget_ended_sections(t);
    for (int i = 0; i < t->section_count; i++)
        release(t, K_section, t->sections[i]);
    return NULL;
}

static void release_all(struct thread *t, int kind) {
    for (int i = 0; i < handle_count; i++)
        if (handles[i].kind == kind && handles[i].state == LIVE)
            release(t, kind, handles[i].raw);
}

/* Every accepted request of a queue that is still ours has its completion. */
static void finish_queue(struct thread *t, struct handle *handle) {
    bds_completion done[8];
    bds_queue queue = {handle->raw};
    t->name = "bds_queue_wait";
    while (handle->completed < handle->accepted) {
        int code = bds_queue_wait(queue, done, 8, 1, PATIENCE_NS);
        if (code < 0)
            fail("%d of %d completions: %d", handle->completed, handle->accepted, code);
        took(t, handle->raw, done, code);
    }
    if (bds_queue_in_flight(queue) != 0)
        fail("requests in flight after all completions");
}

static void shut_down(bds_context context) {
    char *report = NULL;
    int code = bds_context_shutdown(context, &report);
    if (code == BDS_ERR_IN_USE) /* and nothing else has that code */
        fail("nodes are held by nobody: %s", report);
    bds_free(report);
}

/* Gives everything back: sections first, because requests wait for them. */
static void finish(struct thread *t) {
    static const int order[] = {K_queue, K_memory, K_options, K_change, K_backend, K_iothread};
    release_all(t, K_section);
    for (int i = 0; i < handle_count; i++)
        if (handles[i].kind == K_queue && handles[i].state == LIVE)
            finish_queue(t, &handles[i]);
    for (size_t i = 0; i < LEN(order); i++)
        release_all(t, order[i]);
    for (int i = 0; i < handle_count; i++)
        if (handles[i].kind == K_job && handles[i].state == LIVE &&
            bds_job_cancel((bds_job){handles[i].raw}, 1) == BDS_ERR_STALE)
            fail("a job of ours is stale");
    for (int kind = 0; kind < K_COUNT; kind++)
        if (kind != K_context)
            release_all(t, kind);
    for (int i = 0; i < handle_count; i++)
        if (handles[i].kind == K_context && handles[i].state == LIVE)
            shut_down((bds_context){handles[i].raw});
    release_all(t, K_context);
    /* Whatever was ever given out is stale. */
    for (int i = 0; i < handle_count; i++)
        release(t, handles[i].kind, handles[i].raw);
}

static void run(uint64_t seed, int count, int steps) {
    bds_context context;
    program = seed;
    thread_count = count;
    handle_count = id_count = 0;
    for (int i = atomic_exchange(&request_count, 0); i-- > 0;)
        atomic_store(&completed[i], 0);
    for (int i = 0; i < count; i++) {
        struct thread *t = &threads[i];
        t->number = i;
        t->steps = steps / count;
        t->chance.state = seed * MAX_THREADS + (uint64_t)i;
        t->section_count = 0;
        t->trace_len = 0;
        t->trace[0] = 0;
    }
    begin(&threads[0], "bds_context_create");
    OK(bds_context_create(NULL, &context));
    made(&threads[0], K_context, context.raw);
    for (int i = 1; i < count; i++)
        CHECK(pthread_create(&threads[i].id, NULL, work, &threads[i]) == 0);
    work(&threads[0]);
    for (int i = 1; i < count; i++)
        CHECK(pthread_join(threads[i].id, NULL) == 0);
    finish(&threads[0]);
}

static void make_images(void) {
    bds_context context = new_context();
    OK(bds_image_create(context, "f0.raw", "raw", "size=64k"));
    OK(bds_image_create(context, "f1.qcow2", "qcow2", "size=64k"));
    OK(bds_context_unref(context));
}

int main(int argc, char **argv) {
    uint64_t first;
    long count;
    int in_parallel;
    struct rest before;
    pthread_t watcher;
    CHECK(argc == 4);
    first = strtoull(argv[1], NULL, 10);
    count = strtol(argv[2], NULL, 10);
    in_parallel = atoi(argv[3]);
    CHECK(in_parallel >= 1 && in_parallel <= MAX_THREADS);
    CHECK((ever = calloc(MAX_EVER, sizeof *ever)) != NULL);
    make_images();
    CHECK(pthread_create(&watcher, NULL, watch, NULL) == 0);
    /* What is made once in a process. */
    for (int i = 0; i < 4200; i++) { /* a tag for each arena, until all have been used */
        bds_context context = new_context();
        (void)bds_context_unref(context);
    }
    for (uint64_t seed = 0; seed < 100; seed++)
        run(~seed, in_parallel, STEPS);
    before = rest();
    for (uint64_t seed = first; seed < first + (uint64_t)count; seed++)
        run(seed, in_parallel, STEPS);
    nothing_is_left(before, count);
    for (size_t i = 0; i < LEN(calls); i++)
        printf("%s %lu %lu\n", calls[i].name, atomic_load(&worked[i]), atomic_load(&refused[i]));
    return 0;
}
#endif
