/* A queue in GLib's main loop, which polls level-triggered: no wake-up is lost, and none comes for
 * nothing. */
#include <glib-unix.h>

#include "requests.h"

static gboolean readable(gint fd, GIOCondition condition, gpointer loop) {
    (void)fd;
    CHECK(condition == G_IO_IN);
    if (take_completions())
        g_main_loop_quit((GMainLoop *)loop);
    return G_SOURCE_CONTINUE;
}

int main(void) {
    GMainLoop *loop = g_main_loop_new(NULL, FALSE);
    guint watch;
    make_queue();
    watch = g_unix_fd_add(bds_queue_fd(queue), G_IO_IN, readable, loop);
    CHECK(!g_main_context_iteration(NULL, FALSE));
    begin_requests();
    g_main_loop_run(loop);
    CHECK(!g_main_context_pending(NULL));
    CHECK(g_source_remove(watch));
    g_main_loop_unref(loop);
    end_queue();
    return 0;
}
