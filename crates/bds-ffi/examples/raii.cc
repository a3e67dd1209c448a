// The block layer from C++: handles that release themselves, errors as exceptions.
//
//   c++ -std=c++17 raii.cc $(pkg-config --cflags --libs bds) && ./a.out
#include <cstdio>
#include <cstdlib>
#include <string>

#include "bds.hpp"

// An error path that releases nothing by hand: everything here ends with the scope.
static std::uint64_t checked_copy(const bds::Context &context, const bds::Node &from) {
    bds::Node copy = context.open("driver=mem,node-name=copy,size=1M");
    bds::Job job = context.start_job("backup", "job-id=b,device=disk,target=copy,sync=full");
    job.wait();
    bds::Backend reader(copy);
    char text[6] = {};
    reader.read(text, 5, 4096);
    if (std::string(text) != "hello")
        throw std::runtime_error("the copy differs");
    return from.id();
}

int main() {
    try {
        bds::Context context;
        std::uint64_t id;
        {
            bds::Node disk = context.open("driver=mem,node-name=disk,size=1M");
            bds::Backend guest = bds::Backend::writer(disk, "guest");
            guest.write("hello", 5, 4096);
            id = checked_copy(context, disk);

            // A second owner has a reference of its own; moving leaves none behind.
            bds::Node other = disk.ref();
            bds::Node moved = std::move(other);
            if (other || moved.id() != disk.id())
                return 1;

            // While the guard lives, nobody changes the length; its end is the end of the scope.
            {
                bds::Guard guard = bds::block(disk, BDS_BLOCK_RESIZE, "an export runs");
                if (bds_resize(guest.get(), 2 << 20, nullptr, 0) != BDS_ERR_IN_USE)
                    return 1;
            }
            bds::Change(context).rename(disk, "renamed").commit();
            if (disk.name() != "renamed")
                return 1;

            bds::Queue queue(context, 8);
            char buffer[5];
            bds_request request = {};
            request.opcode = BDS_OP_READ;
            request.backend = guest.get();
            request.offset = 4096;
            request.bytes = sizeof buffer;
            request.buffer = buffer;
            bds_completion done;
            if (queue.submit(&request, 1) != 1 || queue.wait(&done, 1) != 1 || done.status != 0)
                return 1;
            std::printf("%.5s\n", buffer);
        }
        // "Is it still valid?" has a stable answer: a reference, or never again.
        if (context.acquire(id))
            return 1;
        try {
            context.open("driver=qcow2,file.driver=file,file.filename=/nonexistent");
            return 1;
        } catch (const bds::Error &error) {
            std::printf("%d: %s\n", error.error_number(), error.what());
        }
        while (std::optional<bds::Event> event = context.next_event())
            if (event->facts.type == BDS_EVENT_JOB_FINISHED)
                std::printf("%s\n", event->json.c_str());
        context.shutdown();
    } catch (const bds::Error &error) {
        std::fprintf(stderr, "%s (%s)\n", error.what(), bds_status_name(error.status()));
        return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}
