/* The trajectory of consumer/walk.c with the latent on the GPU: the fat binary used through the CUDA driver API. Exits
 * with 77 (skipped) where there is no GPU. */
#include <cuda.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <tstitch/cuda.h>
#include <tstitch/step.h>

enum { STEPS = 20, CHANNELS = 4, SPATIAL = 8 * 8, ELEMENTS = CHANNELS * SPATIAL };

static void check(CUresult result, const char* what) {
    const char* text = NULL;
    if (result == CUDA_SUCCESS) return;
    cuGetErrorString(result, &text);
    fprintf(stderr, "%s: %s\n", what, text != NULL ? text : "unknown error");
    exit(1);
}
#define CHECK(call) check(call, #call)

static void* read_file(const char* path) {
    FILE* file = fopen(path, "rb");
    long size = 0;
    char* data = NULL;
    if (file != NULL && fseek(file, 0, SEEK_END) == 0 && (size = ftell(file)) > 0) data = malloc((size_t)size);
    if (data == NULL || fseek(file, 0, SEEK_SET) != 0 || fread(data, 1, (size_t)size, file) != (size_t)size) {
        fprintf(stderr, "%s can't be read\n", path);
        exit(1);
    }
    fclose(file);
    return data;
}

static CUdeviceptr upload(const void* source, size_t bytes) {
    CUdeviceptr pointer;
    CHECK(cuMemAlloc(&pointer, bytes));
    if (source != NULL) CHECK(cuMemcpyHtoD(pointer, source, bytes));
    return pointer;
}

/* Stands for an engine's enqueue: the perfect noise predictor of a data set that is one image, everywhere 0.25. */
static void engine(CUstream stream, CUdeviceptr sample, CUdeviceptr timestep, CUdeviceptr output) {
    float x[ELEMENTS], t;
    CHECK(cuStreamSynchronize(stream));
    CHECK(cuMemcpyDtoH(x, sample, sizeof x));
    CHECK(cuMemcpyDtoH(&t, timestep, sizeof t));
    const double u = 1.5 * t / 1000;
    for (int e = 0; e < ELEMENTS; ++e) x[e] = (float)((x[e] - 0.25 * cos(u)) / sin(u));
    CHECK(cuMemcpyHtoD(output, x, sizeof x));
}

int main(int argc, char** argv) {
    static float rows[STEPS * TSTITCH_ROW_SIZE];
    const int32_t zero = 0, none = -1;
    const uint64_t seed = 42;
    int devices = 0;
    CUdevice device;
    CUcontext context;
    CUstream stream;
    CUmodule module;
    CUfunction initial_noise, prepare, advance;

    if (argc != 2) return fprintf(stderr, "usage: cuda_walk step_kernels.fatbin\n"), 2;
    if (cuInit(0) != CUDA_SUCCESS || cuDeviceGetCount(&devices) != CUDA_SUCCESS || devices == 0) return 77;
    for (int i = 0; i < STEPS; ++i) { /* DDIM with alpha = cos(u), sigma = sin(u), u = 1.5 t / 1000 */
        const double u = 1.5 * (STEPS - i) / STEPS, next = 1.5 * (STEPS - i - 1) / STEPS;
        float* row = rows + i * TSTITCH_ROW_SIZE;
        row[TSTITCH_ROW_T] = (float)(1000 * (STEPS - i) / STEPS);
        row[TSTITCH_ROW_C_IN] = 1;
        row[TSTITCH_ROW_P] = (float)(1 / cos(u));
        row[TSTITCH_ROW_Q] = (float)(-tan(u));
        row[TSTITCH_ROW_A] = (float)(sin(next) / sin(u));
        row[TSTITCH_ROW_B] = (float)(cos(next) - sin(next) / tan(u));
    }
    CHECK(cuDeviceGet(&device, 0));
    CHECK(cuDevicePrimaryCtxRetain(&context, device));
    CHECK(cuCtxSetCurrent(context));
    CHECK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));

    CHECK(cuModuleLoadData(&module, read_file(argv[1])));
    CHECK(cuModuleGetFunction(&initial_noise, module, "initial_noise"));
    CHECK(cuModuleGetFunction(&prepare, module, "prepare_float32_float32"));
    CHECK(cuModuleGetFunction(&advance, module, "advance_float32"));

    const CUdeviceptr latents = upload(NULL, ELEMENTS * sizeof(float)), table = upload(rows, sizeof rows);
    const CUdeviceptr step = upload(&zero, sizeof zero), active = upload(&zero, sizeof zero); /* one lane: number 0 */
    const CUdeviceptr sample = upload(NULL, ELEMENTS * sizeof(float)), timestep = upload(NULL, sizeof(float));
    const CUdeviceptr current = upload(NULL, TSTITCH_CUDA_CURRENT_BYTES);
    const CUdeviceptr output = upload(NULL, ELEMENTS * sizeof(float)), fault = upload(&none, sizeof none);
    tstitch_cuda_initial_noise noise = {.latent = latents, .seed = seed, .scale = 1.0f, .elements = ELEMENTS};
    tstitch_cuda_prepare before = {
        .latents = latents,
        .rows = table,
        .step = step,
        .active = active,
        .current = current,
        .sample = sample,
        .timestep = timestep,
        .row_count = STEPS,
        .elements = ELEMENTS,
        .stride = ELEMENTS,
        .guided = 0,
    };
    tstitch_cuda_advance after = {
        .latents = latents,
        .history = upload(NULL, TSTITCH_HISTORY * ELEMENTS * sizeof(float)),
        .current = current,
        .step = step,
        .seed = upload(&seed, sizeof seed),
        .fault = fault,
        .active = active,
        .output = output,
        .lanes = 1,
        .elements = ELEMENTS,
        .stride = ELEMENTS,
        .spatial = SPATIAL,
        .output_elements = ELEMENTS,
    };
    void* of_noise[] = TSTITCH_CUDA_INITIAL_NOISE_PARAMETERS(noise);
    void* of_prepare[] = TSTITCH_CUDA_PREPARE_PARAMETERS(before);
    void* of_advance[] = TSTITCH_CUDA_ADVANCE_PARAMETERS(after);
    const unsigned blocks = tstitch_cuda_blocks(ELEMENTS), threads = TSTITCH_CUDA_THREADS, batch = 1;

    CHECK(cuLaunchKernel(initial_noise, blocks, 1, 1, threads, 1, 1, 0, stream, of_noise, NULL));
    for (int i = 0; i < STEPS; ++i) {
        CHECK(cuLaunchKernel(prepare, blocks, batch, 1, threads, 1, 1, 0, stream, of_prepare, NULL));
        engine(stream, sample, timestep, output);
        CHECK(cuLaunchKernel(advance, blocks, batch, 1, threads, 1, 1, 0, stream, of_advance, NULL));
    }
    CHECK(cuStreamSynchronize(stream));

    float x[ELEMENTS];
    int32_t faulty;
    CHECK(cuMemcpyDtoH(x, latents, sizeof x));
    CHECK(cuMemcpyDtoH(&faulty, fault, sizeof faulty));
    printf("x[0] = %.4f, fault = %d\n", x[0], faulty);
    return fabsf(x[0] - 0.25f) < 1e-3f && faulty == -1 ? 0 : 1;
}
