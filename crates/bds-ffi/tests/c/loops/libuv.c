/* A queue in libuv's loop: no wake-up is lost, and none comes for nothing. */
#include <uv.h>

#include "requests.h"

static void readable(uv_poll_t *poll, int status, int events) {
    CHECK(status == 0 && events == UV_READABLE);
    if (take_completions())
        uv_close((uv_handle_t *)poll, NULL);
}

int main(void) {
    uv_loop_t loop;
    uv_poll_t poll;
    CHECK(uv_loop_init(&loop) == 0);
    make_queue();
    CHECK(uv_poll_init(&loop, &poll, bds_queue_fd(queue)) == 0);
    CHECK(uv_poll_start(&poll, UV_READABLE, readable) == 0);
    CHECK(uv_run(&loop, UV_RUN_NOWAIT) != 0);
    begin_requests();
    CHECK(uv_run(&loop, UV_RUN_DEFAULT) == 0);
    CHECK(uv_loop_close(&loop) == 0);
    end_queue();
    return 0;
}
