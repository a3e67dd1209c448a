/* Texts, options and special calls of the random programs; see abuse.h. */
#ifndef ABUSE_WORDS_H
#define ABUSE_WORDS_H

static const char *const W_any[] = {"n0", "n1", "b0", "j0", "size=64k", "raw", "on", "file"};
static const char *const W_name[] = {"n0", "n1", "n2", "b0", "b1", "vda"};
static const char *const W_bitmap[] = {"b0", "b1"};
static const char *const W_child[] = {"file", "backing"};
static const char *const W_path[] = {"f0.raw", "f1.qcow2", "f2.qcow2", "missing", "."};
static const char *const W_driver[] = {"raw", "qcow2", "file", "mem"};
static const char *const W_node[] = {
    "driver=mem,size=64k", "driver=mem,size=64k,node-name=n0", "driver=mem,size=64k,node-name=n1",
    "driver=mem,size=64k,node-name=n2", "driver=raw,file=n0", "driver=raw,file=n1,node-name=n2",
    "driver=copy-on-read,file=n0", "driver=null-co,size=64k,node-name=n1",
    "driver=raw,file.driver=mem,file.size=64k,node-name=n0",
    "driver=blkdebug,image=n0,node-name=n1", "driver=throttle,file=n1",
    "driver=qcow2,file.driver=file,file.filename=f1.qcow2,node-name=n0",
    "{\"driver\": \"mem\", \"size\": 65536, \"node-name\": \"n1\"}"};
static const char *const W_reopen[] = {"read-only=on", "read-only=off", "discard=unmap",
                                       "cache.direct=off", "backing=n0"};
static const char *const W_image[] = {"size=64k", "size=128k", "size=64k,preallocation=off"};
static const char *const W_convert[] = {"workers=1", "workers=2", "compress=off"};
static const char *const W_type[] = {"mirror", "backup", "commit", "stream"};
static const char *const W_job[] = {
    "job-id=j0,device=n0,target=n1", "job-id=j1,device=n0,target=n2",
    "job-id=j0,device=n0,target=n1,sync=full", "job-id=j1,device=n1,target=n0,sync=none",
    /* Only of a backup: a mirror that is to be finalized lets no write end before that. */
    "job-id=j2,device=n0,target=n1,sync=full,auto-finalize=off,on-cbw-error=break-guest-write",
    "job-id=j2,device=n1,target=n2,sync=full,auto-dismiss=off", "job-id=j3,device=n2",
    "job-id=j3,device=n0,target=n1,speed=1000", "job-id=j0,device=n0"};
static const char *const W_group[] = {
    "[{\"type\":\"backup\",\"job-id\":\"j0\",\"device\":\"n0\",\"target\":\"n1\",\"sync\":\"full\"}]",
    "[{\"type\":\"mirror\",\"job-id\":\"j1\",\"device\":\"n0\",\"target\":\"n1\"},"
    "{\"type\":\"backup\",\"job-id\":\"j2\",\"device\":\"n2\",\"target\":\"n1\",\"sync\":\"full\"}]",
    "[{\"type\":\"stream\",\"job-id\":\"j3\",\"device\":\"n0\"}]", "[]"};
static const char *const W_mode[] = {"copy-mode=background", "copy-mode=write-blocking"};
static const char *const W_id[] = {"j0", "j1", "j2", "j3"};
static const char *const W_state[] = {"ready", "pending", "running", "paused", "concluded"};
static const char *const W_what[] = {"nodes", "graph", "backends", "holders", "jobs",
                                     "monitor", "bitmaps", "block-jobs", "job-facts",
                                     "job-history", "drivers", "reports", "dump"};
static const char *const W_key[] = {"driver", "size", "node-name", "file", "backing"};
static const char *const W_value[] = {"mem", "64k", "n0", "n1", "raw"};
static const char *const W_preallocation[] = {"off", "full", "falloc"};
static const char *const W_feature[] = {"qcow2", "queue", "none"};

static void fill_context_options(struct thread *t, bds_context_options *options) {
    options->flags = one_in(t, 4) ? any_flags(t) : 0;
}

static void fill_backend_options(struct thread *t, bds_backend_options *options) {
    options->flags = one_in(t, 8) ? any_flags(t) : BDS_BACKEND_WRITABLE;
    if (one_in(t, 3)) {
        options->name = W_name[below(t, LEN(W_name))];
        options->flags |= one_in(t, 2) ? BDS_BACKEND_CLAIM_NAME : 0;
    }
    options->permissions = one_in(t, 8) ? below(t, 16) : 0;
    options->shared_permissions = one_in(t, 8) ? below(t, 16) : 0;
}

static void fill_queue_options(struct thread *t, bds_queue_options *options) {
    options->depth = one_in(t, 8) ? (uint32_t)below(t, 3) : 16;
    options->flags = one_in(t, 3) ? BDS_QUEUE_OFFLOAD : 0;
    if (one_in(t, 2))
        options->iothread.raw = use_any(t, K_iothread, 1);
}

/* Batches, of which what is not accepted has no completion. */
static void call_bds_queue_submit(struct thread *t, int function) {
    bds_request requests[3];
    size_t count = 1 + below(t, 3);
    bds_queue queue;
    int code;
    begin(t, "bds_queue_submit");
    queue.raw = use_any(t, K_queue, 0);
    requests[0] = any_request(t, K_backend, K_memory, K_node);
    /* Its other requests are the first one: the use of handles is known for one alone. */
    for (size_t i = 1; i < count; i++) {
        requests[i] = requests[0];
        requests[i].user_data = (uint64_t)atomic_fetch_add(&request_count, 1);
        CHECK(requests[i].user_data < MAX_REQUESTS);
    }
    code = bds_queue_submit(queue, requests, count);
    if (end(t, function, code, 0)) {
        if (code < 1 || code > (int)count)
            fail("%d of %d requests were accepted", code, (int)count);
        accepted(t, queue.raw, code);
    }
}

static void take(struct thread *t, int function, int waits) {
    bds_completion done[8];
    bds_queue queue;
    int code;
    begin(t, waits ? "bds_queue_wait" : "bds_queue_poll");
    queue.raw = use_any(t, K_queue, 0);
    if (waits)
        code = bds_queue_wait(queue, done, 8, below(t, 4), any_timeout(t));
    else
        code = bds_queue_poll(queue, done, 8);
    if (end(t, function, code, 0))
        took(t, queue.raw, done, code);
}

/* As many handles as jobs. */
static void call_bds_job_start_group(struct thread *t, int function) {
    bds_job jobs[2] = {{0}, {0}};
    bds_context context;
    bds_change change;
    int code;
    begin(t, "bds_job_start_group");
    context.raw = use_any(t, K_context, 0);
    change.raw = use_any(t, K_change, 1);
    code = bds_job_start_group(context, words(t, W_group, LEN(W_group)), change, jobs, below(t, 3));
    if (end(t, function, code, 1))
        for (size_t i = 0; i < LEN(jobs) && jobs[i].raw != 0; i++)
            made(t, K_job, jobs[i].raw);
}

static void call_bds_queue_poll(struct thread *t, int function) {
    take(t, function, 0);
}

static void call_bds_queue_wait(struct thread *t, int function) {
    take(t, function, 1);
}
#endif
