/* Codes, messages and JSON of the calling thread's last failure. */
#include <pthread.h>

#include "check.h"

static void *other_thread(void *unused) {
    (void)unused;
    CHECK(bds_error_status() == 0);
    CHECK(strcmp(bds_error_message(), "") == 0);
    return NULL;
}

int main(void) {
    bds_context context = new_context();
    bds_node node;
    char *json;
    pthread_t thread;
    CHECK(bds_error_status() == 0);
    OK(bds_error_json(&json));
    CHECK(has(json, "null"));

    IS(-ENOENT, bds_node_open_path(context, "/nonexistent/image", "raw", 0, &node));
    CHECK(bds_error_status() == -ENOENT);
    CHECK(strstr(bds_error_message(), "bds_node_open_path: ") == bds_error_message());
    CHECK(strstr(bds_error_message(), "/nonexistent/image") != NULL);

    IS(BDS_ERR_OPTION, bds_node_open(context, "driver=mem,size=1M,colour=red", &node));
    OK(bds_error_json(&json));
    CHECK(strstr(json, "\"name\":\"BDS_ERR_OPTION\"") != NULL);
    CHECK(has(json, "colour"));
    /* A success does not clear it; it is the failing calls that replace it. */
    CHECK(bds_error_status() == BDS_ERR_OPTION);

    IS(BDS_ERR_JSON, bds_node_open(context, "{\"driver\":", &node));
    IS(BDS_ERR_NOT_FOUND, bds_node_find(context, "nothing", &node));
    IS(BDS_ERR_UTF8, bds_node_find(context, "\xff\xfe", &node));
    IS(BDS_ERR_ARGUMENT, bds_node_find(context, NULL, &node));
    IS(BDS_ERR_ARGUMENT, bds_node_find(context, "disk", NULL));
    IS(BDS_ERR_ARGUMENT, bds_error_json(NULL));
    IS(BDS_ERR_VERSION, bds_node_open_path(context, "/x", "raw", 1u << 31, &node));

    CHECK(pthread_create(&thread, NULL, other_thread, NULL) == 0);
    CHECK(pthread_join(thread, NULL) == 0);

    CHECK(strcmp(bds_status_name(BDS_ERR_STALE), "BDS_ERR_STALE") == 0);
    CHECK(strcmp(bds_status_name(-ENOSPC), "errno") == 0);
    CHECK(strcmp(bds_status_name(-123456), "unknown") == 0);
    CHECK(bds_status_to_errno(0) == 0 && bds_status_to_errno(5) == 0);
    CHECK(bds_status_to_errno(-ENOSPC) == ENOSPC);
    CHECK(bds_status_to_errno(BDS_ERR_STALE) == ESTALE);
    CHECK(bds_status_to_errno(-123456) == EIO);
    bds_free(NULL);
    OK(bds_context_unref(context));
    return 0;
}
