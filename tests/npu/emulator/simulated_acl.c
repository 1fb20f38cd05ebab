/* A simulated Ascend device for torch_npu's runtime: device memory is host memory, streams are synchronous.
 *
 * It allocates, copies, counts and orders, as torch_npu's allocator, streams and events need it. It computes nothing:
 * whatever else of CANN the wheel links against is a stub (simulator.py makes them) that says its name and aborts, so
 * that nothing passes in silence. The prototypes are those of the headers in the torch_npu wheel.
 *
 * Graphs are in simulated_graphs.c, which is told of what streams are asked to do and may refuse it.
 *
 * Environment: NPU_SIM_SOC names the SoC (default Ascend910B3), NPU_SIM_MEMORY its bytes of memory, NPU_SIM_DEVICES
 * how many devices there are, NPU_SIM_CANN the version of CANN.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "acl/acl.h"
#include "simulated.h"

#define OUT_OF_MEMORY 207001 /* ACL_ERROR_RT_MEMORY_ALLOCATION */
#define LARGEST_DEVICE_COUNT 64

typedef struct {
    size_t size;
    uint64_t check;
} Block; /* before each allocation; 64 bytes with its padding */
enum { HEADER = 64 };
static const uint64_t ALIVE = 0x51a111aced51a111ULL;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t used[LARGEST_DEVICE_COUNT];
static _Thread_local int current = 0;
static int contexts[LARGEST_DEVICE_COUNT];

static const char *setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

static size_t total(void) {
    return strtoull(setting("NPU_SIM_MEMORY", "68719476736"), NULL, 10);
}

static uint32_t devices(void) {
    return (uint32_t)strtoul(setting("NPU_SIM_DEVICES", "1"), NULL, 10);
}

static void die(const char *what) {
    fprintf(stderr, "simulated ACL: %s\n", what);
    abort();
}

/* life of the process, devices, contexts */

aclError aclInit(const char *path) { return path ? ACL_SUCCESS : ACL_SUCCESS; }
aclError aclFinalize(void) { return ACL_SUCCESS; }
const char *aclrtGetSocName(void) { return setting("NPU_SIM_SOC", "Ascend910B3"); }
const char *aclGetRecentErrMsg(void) { return last_words(); }
aclError aclrtGetDeviceCount(uint32_t *count) {
    *count = devices();
    return ACL_SUCCESS;
}
aclError aclrtSetDevice(int32_t device) {
    if (device < 0 || (uint32_t)device >= devices()) return ACL_ERROR_INVALID_PARAM;
    current = device;
    return ACL_SUCCESS;
}
aclError aclrtGetDevice(int32_t *device) {
    *device = current;
    return ACL_SUCCESS;
}
aclError aclrtResetDevice(int32_t device) { return device < 0 ? ACL_ERROR_INVALID_PARAM : ACL_SUCCESS; }
aclError aclrtGetCurrentContext(aclrtContext *context) {
    *context = &contexts[current];
    return ACL_SUCCESS;
}
aclError aclrtSetCurrentContext(aclrtContext context) {
    current = (int)((int *)context - contexts);
    return ACL_SUCCESS;
}
aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) {
    *can = device == peer;
    return ACL_SUCCESS;
}
aclError aclrtGetDeviceCapability(int32_t device, aclrtDevFeatureType feature, int32_t *value) {
    (void)device, (void)feature;
    *value = 0;
    return ACL_SUCCESS;
}
aclError aclsysGetVersionStr(char *package, char *version) {
    (void)package;
    strcpy(version, setting("NPU_SIM_CANN", "8.5.0"));
    return ACL_SUCCESS;
}
aclError aclsysGetCANNVersion(aclCANNPackageName name, aclCANNPackageVersion *version) {
    (void)name;
    memset(version, 0, sizeof *version);
    strncpy(version->version, setting("NPU_SIM_CANN", "8.5.0"), sizeof version->version - 1);
    return ACL_SUCCESS;
}
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode mode) { return mode >= 0 ? ACL_SUCCESS : ACL_ERROR_INVALID_PARAM; }
aclError aclrtSetStreamOverflowSwitch(aclrtStream stream, uint32_t flag) { return stream || flag ? ACL_SUCCESS : ACL_SUCCESS; }
aclError aclrtGetStreamOverflowSwitch(aclrtStream stream, uint32_t *flag) {
    (void)stream;
    *flag = 0;
    return ACL_SUCCESS;
}
aclError aclrtSetOpExecuteTimeOut(uint32_t seconds) { return seconds ? ACL_SUCCESS : ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOutV2(uint64_t wanted, uint64_t *actual) {
    *actual = wanted;
    return ACL_SUCCESS;
}
aclError aclrtSetOpWaitTimeout(uint32_t seconds) { return seconds ? ACL_SUCCESS : ACL_SUCCESS; }
aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t *value) {
    (void)option;
    *value = 0;
    return ACL_SUCCESS;
}
aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) { return option || value ? ACL_SUCCESS : ACL_SUCCESS; }
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) { return aclrtSetSysParamOpt(option, value); }
int HcclSetConfig(int option, int64_t value) { return option || value ? 0 : 0; }
aclError aclrtPeekAtLastError(aclrtLastErrLevel level) { return level == ACL_RT_THREAD_LEVEL ? ACL_SUCCESS : ACL_SUCCESS; }
aclError aclrtGetLastError(aclrtLastErrLevel level) { return aclrtPeekAtLastError(level); }

/* memory */

static aclError allocate(void **pointer, size_t size, int on_device) {
    Block *block = NULL;
    pthread_mutex_lock(&lock);
    int fits = !on_device || used[current] + size <= total();
    if (fits && posix_memalign((void **)&block, 512, size + 2 * HEADER) == 0) {
        block->size = on_device ? size : 0;
        block->check = ALIVE;
        used[current] += block->size;
    }
    pthread_mutex_unlock(&lock);
    *pointer = block ? (char *)block + HEADER : NULL;
    return block ? ACL_SUCCESS : OUT_OF_MEMORY;
}

static aclError release(void *pointer) {
    if (!pointer) return ACL_SUCCESS;
    Block *block = (Block *)((char *)pointer - HEADER);
    if (block->check != ALIVE) die("an address is freed that was not allocated");
    block->check = 0;
    pthread_mutex_lock(&lock);
    used[current] -= block->size < used[current] ? block->size : used[current];
    pthread_mutex_unlock(&lock);
    free(block);
    return ACL_SUCCESS;
}

aclError aclrtMalloc(void **pointer, size_t size, aclrtMemMallocPolicy policy) {
    (void)policy;
    return allocate(pointer, size, 1);
}
aclError aclrtMallocAlign32(void **pointer, size_t size, aclrtMemMallocPolicy policy) {
    return aclrtMalloc(pointer, size, policy);
}
aclError aclrtFree(void *pointer) { return release(pointer); }
aclError aclrtMallocHost(void **pointer, size_t size) { return allocate(pointer, size, 0); }
aclError aclrtFreeHost(void *pointer) { return release(pointer); }
aclError aclrtGetMemInfo(aclrtMemAttr kind, size_t *unused, size_t *all) {
    (void)kind;
    *all = total();
    *unused = *all - used[current];
    return ACL_SUCCESS;
}
aclError aclrtMemset(void *pointer, size_t room, int32_t value, size_t count) {
    /* even while a graph is captured: torch_npu clears its external events so */
    if (count > room) return ACL_ERROR_INVALID_PARAM;
    memset(pointer, value, count);
    return ACL_SUCCESS;
}
aclError aclrtMemsetAsync(void *pointer, size_t room, int32_t value, size_t count, aclrtStream stream) {
    if (is_capturing(stream)) return refuse("memory is set apart from operations in a graph that is captured");
    return aclrtMemset(pointer, room, value, count);
}
aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t count, aclrtMemcpyKind kind) {
    (void)kind;
    if (is_capturing(NULL)) return refuse("memory is copied by the host while a graph is captured");
    if (count > room) return ACL_ERROR_INVALID_PARAM;
    memmove(to, from, count);
    return ACL_SUCCESS;
}
aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t count, aclrtMemcpyKind kind, aclrtStream s) {
    (void)s;
    return aclrtMemcpy(to, room, from, count, kind);
}

/* streams and events: all work is done when it is asked for */

aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t priority, uint32_t flag) {
    (void)priority, (void)flag;
    *stream = malloc(1);
    return *stream ? ACL_SUCCESS : OUT_OF_MEMORY;
}
aclError aclrtCreateStream(aclrtStream *stream) { return aclrtCreateStreamWithConfig(stream, 0, 0); }
aclError aclrtDestroyStream(aclrtStream stream) {
    free(stream);
    return ACL_SUCCESS;
}
aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }
aclError aclrtSetStreamFailureMode(aclrtStream stream, uint64_t mode) { return stream || !mode ? ACL_SUCCESS : ACL_SUCCESS; }
aclError aclrtSynchronizeStream(aclrtStream stream) {
    return is_capturing(stream) ? refuse("the host waits for a stream that is captured") : ACL_SUCCESS;
}
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t ms) { return ms ? aclrtSynchronizeStream(stream) : 0; }
aclError aclrtSynchronizeDevice(void) {
    return is_capturing(NULL) ? refuse("the host waits for the device while a graph is captured") : ACL_SUCCESS;
}
aclError aclrtSynchronizeDeviceWithTimeout(int32_t ms) { return ms ? aclrtSynchronizeDevice() : ACL_SUCCESS; }
aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status) {
    (void)stream;
    *status = ACL_STREAM_STATUS_COMPLETE;
    return ACL_SUCCESS;
}
aclError aclrtStreamGetId(aclrtStream stream, int32_t *id) {
    (void)stream;
    *id = 0;
    return ACL_SUCCESS;
}
aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flag) {
    (void)flag;
    *event = calloc(1, sizeof(struct timespec));
    return *event ? ACL_SUCCESS : OUT_OF_MEMORY;
}
aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flag) { return aclrtCreateEventExWithFlag(event, flag); }
aclError aclrtDestroyEvent(aclrtEvent event) {
    free(event);
    return ACL_SUCCESS;
}
aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
    (void)stream;
    clock_gettime(CLOCK_MONOTONIC, event);
    return ACL_SUCCESS;
}
aclError aclrtResetEvent(aclrtEvent event, aclrtStream stream) { return event || stream ? ACL_SUCCESS : ACL_SUCCESS; }
aclError aclrtSynchronizeEvent(aclrtEvent event) { return event ? ACL_SUCCESS : ACL_ERROR_INVALID_PARAM; }
aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event) { return event || stream ? ACL_SUCCESS : ACL_SUCCESS; }
aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status) {
    (void)event;
    *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
    return ACL_SUCCESS;
}
aclError aclrtEventElapsedTime(float *ms, aclrtEvent start, aclrtEvent end) {
    const struct timespec *a = start, *b = end;
    *ms = (float)(b->tv_sec - a->tv_sec) * 1e3f + (float)(b->tv_nsec - a->tv_nsec) / 1e6f;
    return ACL_SUCCESS;
}
