/* HCCL between the processes of one machine, through shared memory: as much of it as torch_npu's ProcessGroupHCCL
 * needs for gathering, exchanging and sums. Everything is done when it is asked for. A sum starts with another rank at
 * each rank, as nobody may rely on the order of HCCL's. hccl.h is C++, so its types stand here as C has them.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "simulated.h"

enum { INT32 = 2, FP32 = 4, DTYPES = 12, SUM = 0, MAX = 2, OK = 0, WRONG = 1, UNSUPPORTED = 5, MOST_COMMS = 16 };
static const size_t BYTES[DTYPES] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2};
#define SLOT ((size_t)1 << 20) /* bytes of a rank; longer messages go in pieces */
#define NAME 128

typedef struct {
    pthread_barrier_t barrier;
    volatile int ready;
} Head;

typedef struct {
    uint32_t rank, size;
    Head *head;
    char *slots;
    char name[NAME];
} Comm;

static Comm *comms[MOST_COMMS];

/* the life of a communicator */

int HcclGetRootInfo(void *info) {
    static int made;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    memset(info, 0, NAME);
    snprintf(info, NAME, "/npu-sim-%d-%d-%ld", (int)getpid(), made++, now.tv_nsec);
    return OK;
}

int HcclCommInitRootInfo(uint32_t size, const void *info, uint32_t rank, void **made) {
    size_t room = 4096 + size * SLOT;
    Comm *comm = calloc(1, sizeof *comm);
    int slot = 0, file = shm_open(info, O_CREAT | O_RDWR, 0600);
    while (slot < MOST_COMMS && comms[slot]) slot++;
    if (!comm || slot == MOST_COMMS || file < 0 || ftruncate(file, (off_t)room)) return WRONG;
    Head *head = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (head == MAP_FAILED) return WRONG;
    *comm = (Comm){rank, size, head, (char *)head + 4096, ""};
    snprintf(comm->name, NAME, "%s", (const char *)info);
    if (rank == 0) {
        pthread_barrierattr_t shared;
        pthread_barrierattr_init(&shared);
        pthread_barrierattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
        pthread_barrier_init(&head->barrier, &shared, size);
        __sync_synchronize();
        head->ready = 1;
    }
    while (!head->ready) usleep(200);
    pthread_barrier_wait(&head->barrier);
    if (rank == 0) shm_unlink(info);
    *made = comms[slot] = comm;
    return OK;
}
int HcclCommInitRootInfoConfig(uint32_t size, const void *info, uint32_t rank, const void *config, void **made) {
    (void)config;
    return HcclCommInitRootInfo(size, info, rank, made);
}
uint32_t HcclGetCommConfigCapability(void) { return 0; }
int HcclGetCommName(const Comm *comm, char *name) {
    strcpy(name, comm->name);
    return OK;
}
int HcclGetCommAsyncError(const Comm *comm, int *error) {
    (void)comm;
    *error = OK;
    return OK;
}
int HcclCommDestroy(Comm *comm) {
    for (int slot = 0; slot < MOST_COMMS; slot++)
        if (comms[slot] == comm) comms[slot] = NULL;
    free(comm); /* the memory stays mapped: another rank may still be on its way out of the barrier */
    return OK;
}

/* what moves */

static void wait_for_all(Comm *comm) { pthread_barrier_wait(&comm->head->barrier); }

/* Every rank's `count` bytes, one after the other. */
static void gather(Comm *comm, const char *mine, char *all, size_t count) {
    for (size_t done = 0; done < count; done += SLOT) {
        size_t piece = count - done < SLOT ? count - done : SLOT;
        memcpy(comm->slots + comm->rank * SLOT, mine + done, piece);
        wait_for_all(comm);
        for (uint32_t rank = 0; rank < comm->size; rank++)
            memcpy(all + rank * count + done, comm->slots + rank * SLOT, piece);
        wait_for_all(comm);
    }
}

int HcclAllGather(void *mine, void *all, uint64_t count, int dtype, Comm *comm, void *stream) {
    if (dtype < 0 || dtype >= DTYPES) return UNSUPPORTED;
    if (is_capturing(stream)) return refuse("a collective is captured, which is not modelled"), WRONG;
    gather(comm, mine, all, count * BYTES[dtype]);
    return OK;
}

int HcclAllReduce(void *mine, void *out, uint64_t count, int dtype, int how, Comm *comm, void *stream) {
    if ((dtype != INT32 && dtype != FP32) || (how != SUM && how != MAX)) return UNSUPPORTED;
    if (is_capturing(stream)) return refuse("a collective is captured, which is not modelled"), WRONG;
    char *all = malloc(comm->size * count * 4 + 1);
    gather(comm, mine, all, count * 4);
    memcpy(out, all + comm->rank * count * 4, count * 4);
    for (uint32_t next = 1; next < comm->size; next++) {
        const char *other = all + (comm->rank + next) % comm->size * count * 4;
        for (uint64_t at = 0; at < count; at++) {
            const float *f = (const float *)other + at;
            const int32_t *i = (const int32_t *)other + at;
            float *of = (float *)out + at;
            int32_t *oi = (int32_t *)out + at;
            if (dtype == FP32)
                *of = how == SUM ? *of + *f : *f > *of ? *f : *of;
            else
                *oi = how == SUM ? (int32_t)((uint32_t)*oi + (uint32_t)*i) : *i > *oi ? *i : *oi;
        }
    }
    free(all);
    return OK;
}

/* `counts` and `starts` in elements, for each rank: what goes to it, what comes from it. */
int HcclAlltoAllV(const void *mine, const uint64_t *counts, const uint64_t *starts, int dtype, void *out,
                  const uint64_t *out_counts, const uint64_t *out_starts, int out_dtype, Comm *comm, void *stream) {
    if (dtype != out_dtype || dtype < 0 || dtype >= DTYPES) return UNSUPPORTED;
    if (is_capturing(stream)) return refuse("a collective is captured, which is not modelled"), WRONG;
    size_t width = BYTES[dtype], most = 0;
    for (uint32_t rank = 0; rank < comm->size; rank++) {
        if (counts[rank] != counts[0] || out_counts[rank] != counts[0]) return UNSUPPORTED;
        most = counts[0] * width;
    }
    char *packed = malloc(comm->size * most + 1), *all = malloc(comm->size * comm->size * most + 1);
    for (uint32_t rank = 0; rank < comm->size; rank++)
        memcpy(packed + rank * most, (const char *)mine + starts[rank] * width, most);
    gather(comm, packed, all, comm->size * most);
    for (uint32_t rank = 0; rank < comm->size; rank++)
        memcpy((char *)out + out_starts[rank] * width, all + (rank * comm->size + comm->rank) * most, most);
    free(packed);
    free(all);
    return OK;
}
int HcclAlltoAll(const void *mine, uint64_t count, int dtype, void *out, uint64_t out_count, int out_dtype, Comm *comm,
                 void *stream) {
    uint64_t counts[64], starts[64];
    if (comm->size > 64 || count != out_count) return UNSUPPORTED;
    for (uint32_t rank = 0; rank < comm->size; rank++) counts[rank] = count, starts[rank] = rank * count;
    return HcclAlltoAllV(mine, counts, starts, dtype, out, counts, starts, out_dtype, comm, stream);
}

/* For the emulator's fused operations: the bytes of all ranks of a communicator, by its name; its size, 0 for none. */
__attribute__((visibility("default"))) uint32_t sim_gather(const char *name, const void *mine, void *all, size_t count) {
    for (int slot = 0; slot < MOST_COMMS; slot++)
        if (comms[slot] && !strcmp(comms[slot]->name, name)) {
            if (all) gather(comms[slot], mine, all, count);
            return comms[slot]->size;
        }
    return 0;
}
