// The GPU: its limits, compiled kernels, buffers, and programs of a plan.  The counterpart of
// runtime/mbq_runtime/engine/webgpu.py.

import { MbqError } from "./errors.js";

// Limits that are raised from the standard's defaults to those of the adapter.
const LIMITS = [
  "maxBufferSize", "maxStorageBufferBindingSize", "maxComputeWorkgroupStorageSize", "maxComputeInvocationsPerWorkgroup",
  "maxComputeWorkgroupSizeX", "maxStorageBuffersPerShaderStage",
];

function whyNoGpu() {
  if (!globalThis.isSecureContext) {
    return `browsers give the GPU to pages over https and on localhost alone, and this one came from ${location.origin}; ` +
      "put the page on an https server";
  }
  return "this browser has no WebGPU; Chrome and Edge have it from 113 (Linux: 144, Android: 121), Safari from 26";
}

export class Device {
  // Raises MbqError of kind "unsupported", which says what would work.
  static async open() {
    if (!globalThis.navigator?.gpu) throw new MbqError("unsupported", whyNoGpu());
    const adapter = await navigator.gpu.requestAdapter({ powerPreference: "high-performance" });
    if (adapter === null) {
      throw new MbqError("unsupported", "this browser has WebGPU, but finds no GPU that it may use; look at chrome://gpu, " +
        "update the driver, or run the bundle with mbq run");
    }
    const requiredLimits = Object.fromEntries(LIMITS.map(name => [name, adapter.limits[name]]));
    return new Device(adapter, await adapter.requestDevice({ requiredLimits }));
  }

  constructor(adapter, device) {
    const { limits, info = {} } = adapter;
    this.gpu = device;
    this.name = [info.description || info.device, info.vendor, info.architecture].filter(Boolean).join(", ") || "the GPU";
    this.limits = {
      buffer_bytes: Math.min(limits.maxBufferSize, limits.maxStorageBufferBindingSize),
      group_items: Math.min(limits.maxComputeInvocationsPerWorkgroup, limits.maxComputeWorkgroupSizeX),
      local_bytes: limits.maxComputeWorkgroupStorageSize,
      bindings: limits.maxStorageBuffersPerShaderStage,
    };
    this.pipelines = {};
    this.lastGroups = {};
    this.alive = true;
    this.fault = null;  // what the GPU refused; results after it mean nothing
    device.onuncapturederror = ({ error }) => this.fault ??= error.message;
    this.lost = device.lost.then(({ message }) => {
      this.alive = false;
      return new MbqError("lost", `the GPU was taken away${message ? ` (${message})` : ""}`);
    });
  }

  // Raises MbqError where a plan needs more than the device has.
  check(plan) {
    const labels = {
      buffer_bytes: "bytes in one buffer", group_items: "items in a work-group", local_bytes: "bytes of local memory",
      bindings: "buffers in a kernel",
    };
    for (const [name, label] of Object.entries(labels)) {
      if (plan.needs[name] > this.limits[name]) {
        throw new MbqError("unsupported", `the bundle needs ${plan.needs[name]} ${label}, ${this.name} has ` +
          `${this.limits[name]}; take a smaller model`);
      }
    }
  }

  // Runs `make`, and raises MbqError where the GPU has no room for its buffers.
  async allocating(make) {
    this.gpu.pushErrorScope("out-of-memory");
    const found = make();
    if (await this.gpu.popErrorScope()) {
      throw new MbqError("unsupported", `${this.name} has no room for the model; close other tabs, or take a smaller bundle ` +
        "(mbq trim)");
    }
    return found;
  }

  // kernels: of the plan; texts: their source, by name.
  async compile(kernels, texts) {
    await Promise.all(Object.keys(kernels).map(async name => {
      const module = this.gpu.createShaderModule({ code: texts[name] });
      try {
        this.pipelines[name] = await this.gpu.createComputePipelineAsync({
          layout: "auto", compute: { module, entryPoint: `${name}_kernel` },
        });
      } catch (error) {
        const { messages } = await module.getCompilationInfo();
        const said = messages.map(m => `line ${m.lineNum}: ${m.message}`).join("; ") || error.message;
        throw new MbqError("broken", `${this.name} does not compile the kernel ${name}: ${said.slice(0, 500)}`);
      }
    }));
  }

  buffer(size) {
    return this.gpu.createBuffer({
      size, usage: GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_DST | GPUBufferUsage.COPY_SRC,
    });
  }

  write(buffer, bytes, at = 0) {
    this.gpu.queue.writeBuffer(buffer, at, bytes);
  }

  // A uniform with the number of the last work-group along x.  It follows the buffers of every kernel.
  #lastGroup(index) {
    if (!(index in this.lastGroups)) {
      const made = this.gpu.createBuffer({ size: 16, usage: GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST });
      this.gpu.queue.writeBuffer(made, 0, new Uint32Array([index, 0, 0, 0]));
      this.lastGroups[index] = made;
    }
    return this.lastGroups[index];
  }

  // launches: a program of the plan; buffers: by name.
  prepare(launches, buffers) {
    return launches.map(launch => {
      const pipeline = this.pipelines[launch.kernel];
      const bound = [...launch.buffers.map(name => buffers[name]), this.#lastGroup(launch.grid[0] - 1)];
      const entries = bound.map((buffer, binding) => ({ binding, resource: { buffer } }));
      return { pipeline, grid: launch.grid, group: this.gpu.createBindGroup({ layout: pipeline.getBindGroupLayout(0), entries }) };
    });
  }

  // Runs programs in order.
  run(...programs) {
    const encoder = this.gpu.createCommandEncoder(), pass = encoder.beginComputePass();
    for (const { pipeline, group, grid } of programs.flat()) {
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, group);
      pass.dispatchWorkgroups(...grid);
    }
    pass.end();
    this.gpu.queue.submit([encoder.finish()]);
  }

  // Waits for all that is in the queue, and gives the first bytes of a buffer.
  async read(buffer, size) {
    const copy = this.gpu.createBuffer({ size, usage: GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST });
    const encoder = this.gpu.createCommandEncoder();
    encoder.copyBufferToBuffer(buffer, 0, copy, 0, size);
    this.gpu.queue.submit([encoder.finish()]);
    try {
      await copy.mapAsync(GPUMapMode.READ);
      if (this.fault) throw new MbqError("broken", `${this.name} refuses the kernels: ${this.fault.slice(0, 300)}`);
      return copy.getMappedRange().slice(0);
    } catch (error) {
      if (error instanceof MbqError) throw error;
      // A device that is gone tells of it a moment later.
      const gone = await Promise.race([this.lost, new Promise(done => setTimeout(done, 200, null))]);
      throw gone ?? new MbqError("lost", `the GPU gives no result (${error.message})`);
    } finally {
      copy.destroy();
    }
  }

  destroy() {
    this.gpu.destroy();
  }
}
