/* A plugin for QEMU's user emulation that counts what an arm64 program executes: instructions, and those among them that
 * are integer dot products.  Both counts are logged when the program ends.  The declarations are what is needed of
 * QEMU's plugin interface, version 1, whose header Debian does not ship. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

typedef uint64_t PluginId;
typedef struct qemu_plugin_tb Block;
typedef struct qemu_plugin_insn Instruction;
enum { ADD_U64 = 0 };

void qemu_plugin_register_vcpu_tb_trans_cb(PluginId id, void (*translated)(PluginId, Block *));
void qemu_plugin_register_atexit_cb(PluginId id, void (*ended)(PluginId, void *), void *data);
void qemu_plugin_register_vcpu_tb_exec_inline(Block *block, int operation, void *counter, uint64_t amount);
size_t qemu_plugin_tb_n_insns(const Block *block);
Instruction *qemu_plugin_tb_get_insn(const Block *block, size_t index);
const void *qemu_plugin_insn_data(const Instruction *instruction);
void qemu_plugin_outs(const char *text);

EXPORT int qemu_plugin_version = 1;

static uint64_t instructions, dots;

/* Encodings of A64: a word that equals `value` under `mask`. */
static const struct {
  uint32_t mask, value;
} dot_products[] = {
    {0xBFE0FC00, 0x0E809400}, /* sdot */
    {0xBFC0F400, 0x0F80E000}, /* sdot by element */
    {0xFFE0FC00, 0x4E80A400}, /* smmla */
    {0xBF20FC00, 0x0E20C000}, /* smull */
    {0xBF20FC00, 0x0E208000}, /* smlal */
};

static int is_dot(uint32_t word) {
  for (size_t i = 0; i < sizeof dot_products / sizeof *dot_products; ++i)
    if ((word & dot_products[i].mask) == dot_products[i].value) return 1;
  return 0;
}

static void translated(PluginId id, Block *block) {
  (void)id;
  const size_t count = qemu_plugin_tb_n_insns(block);
  uint64_t found = 0;
  for (size_t i = 0; i < count; ++i) {
    uint32_t word;
    memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, i)), sizeof word);
    found += is_dot(word);
  }
  qemu_plugin_register_vcpu_tb_exec_inline(block, ADD_U64, &instructions, count);
  if (found) qemu_plugin_register_vcpu_tb_exec_inline(block, ADD_U64, &dots, found);
}

static void ended(PluginId id, void *data) {
  (void)id, (void)data;
  char text[96];
  snprintf(text, sizeof text, "%" PRIu64 " %" PRIu64 "\n", instructions, dots);
  qemu_plugin_outs(text);
}

EXPORT int qemu_plugin_install(PluginId id, const void *info, int argc, char **argv) {
  (void)info, (void)argc, (void)argv;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, ended, NULL);
  return 0;
}
