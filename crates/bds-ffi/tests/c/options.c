/* An option builder makes what `options` parameters take. */
#include "check.h"

int main(void) {
    bds_context context = new_context();
    bds_options options;
    bds_node node, disk = new_disk(context, "driver=mem,node-name=disk,size=1M");
    char *json, *name;

    OK(bds_options_create(&options));
    OK(bds_options_set(options, "driver", "raw"));
    OK(bds_options_set(options, "file.driver", "null-co"));
    OK(bds_options_merge(options, "{\"node-name\": \"n\", \"file\": {\"size\": 4096}}"));
    OK(bds_options_json(options, &json));
    CHECK(strstr(json, "\"driver\":\"null-co\"") != NULL);
    OK(bds_node_open(context, json, &node));
    bds_free(json);
    OK(bds_node_name(node, &name));
    CHECK(strcmp(name, "n") == 0);
    bds_free(name);
    OK(bds_node_unref(node));

    OK(bds_options_set_node(options, "file", disk));
    OK(bds_options_json(options, &json));
    CHECK(has(json, "\"file\":\"disk\""));
    IS(BDS_ERR_JSON, bds_options_merge(options, "{nonsense"));
    IS(BDS_ERR_ARGUMENT, bds_options_set(options, NULL, "x"));
    IS(BDS_ERR_UTF8, bds_options_set(options, "\xff", "x"));
    OK(bds_options_set(options, "name", "\xff")); /* file names are bytes */
    OK(bds_options_unref(options));
    IS(BDS_ERR_STALE, bds_options_json(options, &json));
    OK(bds_node_unref(disk));
    OK(bds_context_unref(context));
    return 0;
}
