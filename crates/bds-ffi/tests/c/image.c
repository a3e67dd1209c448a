/* Image operations: create, probe, info, measure, map, check, convert. */
#include "check.h"

int main(void) {
    char source[512], target[512], *text;
    char data[4096];
    bds_context context = new_context();
    bds_node from, to;
    bds_backend reader, writer;
    static const bds_backend none = {0};

    in_dir(source, sizeof source, "a.qcow2");
    in_dir(target, sizeof target, "b.raw");
    OK(bds_image_create(context, source, "qcow2", "{\"size\": 4194304}"));
    OK(bds_image_create(context, target, "raw", "size=4M"));
    IS(BDS_ERR_OPTION, bds_image_create(context, source, "qcow2", "size=4M,colour=red"));
    OK(bds_image_probe(context, source, &text));
    CHECK(has(text, "qcow2"));
    OK(bds_image_info(context, source, NULL, BDS_OPEN_PROBE, &text));
    CHECK(has(text, "\"virtual-size\":4194304"));
    IS(BDS_ERR_ARGUMENT, bds_image_info(context, source, NULL, 0, &text));
    OK(bds_image_measure(context, "qcow2", "size=1G", none, &text));
    CHECK(has(text, "\"fully-allocated\":1074135040"));
    IS(BDS_ERR_ARGUMENT, bds_image_measure(context, "qcow2", NULL, none, &text));

    OK(bds_node_open_path(context, source, "qcow2", 0, &from));
    OK(bds_node_open_path(context, target, "raw", 0, &to));
    reader = new_writer(from);
    writer = new_writer(to);
    memset(data, 9, sizeof data);
    OK(bds_pwrite(reader, data, sizeof data, 1 << 20, 0));
    OK(bds_image_map(reader, 0, 0, &text));
    CHECK(has(text, "\"start\":1048576"));
    OK(bds_image_measure(context, "raw", NULL, reader, &text));
    CHECK(has(text, "required"));
    OK(bds_image_check(reader, &text));
    CHECK(has(text, "\"corruptions\":0"));
    IS(BDS_ERR_UNSUPPORTED, bds_image_check(writer, &text));

    OK(bds_image_convert(reader, writer, "{\"target-is-zero\": true, \"workers\": 4}", &text));
    CHECK(has(text, "\"total\":4194304"));
    memset(data, 0, sizeof data);
    OK(bds_pread(writer, data, sizeof data, 1 << 20, 0));
    CHECK(data[0] == 9 && data[4095] == 9);
    IS(BDS_ERR_OPTION, bds_image_convert(reader, writer, "compress=on", NULL));
    IS(BDS_ERR_OPTION, bds_image_convert(reader, writer, "speed=high", NULL));

    OK(bds_backend_unref(reader));
    OK(bds_backend_unref(writer));
    OK(bds_node_unref(from));
    OK(bds_node_unref(to));
    OK(bds_context_unref(context));
    return 0;
}
