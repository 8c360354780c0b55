//! Flags of the commands that turn files into files or look at them: fuse, convert, export, inspect, doctor.

use super::MetricArgs;
use clap::{Args, Subcommand};

/// What `--gguf-type` and `--type` take.
const GGUF_TYPES: [&str; 6] = ["auto", "f32", "f16", "bf16", "q8_0", "q4_1"];

/// `fuse`.
#[derive(Args, Debug)]
pub(crate) struct FuseArgs {
    /// Base model directory or Hugging Face id
    #[arg(long, default_value = "mlx_model")]
    pub(crate) model: String,
    /// Where the fused model is written; a model directory there is replaced
    #[arg(long, default_value = "fused_model")]
    pub(crate) save_path: String,
    /// Adapter directory
    #[arg(long, default_value = "adapters")]
    pub(crate) adapter_path: String,
    /// Write a model without packed weights: --policy dense, and the weights without an adapter too
    #[arg(long)]
    pub(crate) dequantize: bool,
    /// Write the fused model as a GGUF file, too
    #[arg(long)]
    pub(crate) export_gguf: bool,
    /// Name of that file, under --save-path
    #[arg(long, default_value = "ggml-model-f16.gguf")]
    pub(crate) gguf_path: String,
    /// Type of its matrices (default: f16, as mlx_lm); auto keeps packed weights packed
    #[arg(long, value_parser = GGUF_TYPES, help_heading = "graft's own")]
    pub(crate) gguf_type: Option<String>,
    /// Write the report as a page, too
    #[arg(long, value_name = "FILE", help_heading = "graft's own")]
    pub(crate) html: Option<String>,
    /// What a packed weight with an adapter becomes: 8 bits, or floats where 8 bits lose the update (raise, the default);
    /// floats (dense); its own width and mode again, errors made good by later columns (same); its own codes with DoRA's row factor in
    /// the scales, and an adapter for the rest (fold)
    #[arg(long, value_parser = ["raise", "dense", "same", "fold"], help_heading = "graft's own")]
    pub(crate) policy: Option<String>,
    /// Fuse into this precision of the same base instead of --model, which is the one that the adapter was trained on
    #[arg(long, value_name = "DIR", help_heading = "graft's own")]
    pub(crate) base: Option<String>,
    /// How the result is judged before it is kept: on rows of data (model, the default), by its weights (layers), or not (off)
    #[arg(long, value_parser = ["model", "layers", "off"], default_value = "model", help_heading = "graft's own")]
    pub(crate) verify: String,
    /// Rows for --verify model (valid.jsonl of a directory, or a file) and for --policy same (train.jsonl beside them, or the
    /// file's other rows); default: those that the adapter's config names
    #[arg(long, value_name = "DIR|FILE", help_heading = "graft's own")]
    pub(crate) data: Option<String>,
    /// Rows of --verify model, spread over the file
    #[arg(long, default_value_t = 16, help_heading = "graft's own")]
    pub(crate) verify_rows: usize,
    /// Fuse nothing: measure a model that is fused already, by another tool perhaps, as --verify model does
    #[arg(long, value_name = "DIR", conflicts_with_all = ["policy", "dequantize", "base", "force", "html"], help_heading = "graft's own")]
    pub(crate) measure: Option<String>,
    /// Keep the result even if less than 90 % of the update may have been kept, and take the adapter of another model of the
    /// same shapes
    #[arg(long, help_heading = "graft's own")]
    pub(crate) force: bool,
    #[command(flatten, next_help_heading = "With --verify model: answers to its rows, scored")]
    pub(crate) metric: MetricArgs,
}

/// `convert` and `quantize`.
#[derive(Args, Debug)]
pub(crate) struct ConvertArgs {
    /// Model directory, Hugging Face id, .gguf file, or a directory with one .gguf file
    #[arg(long, visible_alias = "model")]
    pub(crate) hf_path: Option<String>,
    /// Where the model is written; must not exist
    #[arg(long, default_value = "mlx_model")]
    pub(crate) mlx_path: String,
    /// Quantize
    #[arg(short, long)]
    pub(crate) quantize: bool,
    /// Group size: 32, 64 (default) or 128; modes of floats have their own
    #[arg(long)]
    pub(crate) q_group_size: Option<i32>,
    /// Bits: 2, 3, 4 (default), 5, 6 or 8; modes of floats have their own
    #[arg(long)]
    pub(crate) q_bits: Option<i32>,
    /// Quantization mode: whole numbers with a scale and a bias (affine), or floats with a scale of 8 bits: of 4 bits in groups of
    /// 32 (mxfp4) or 16 (nvfp4), of 8 bits in groups of 32 (mxfp8)
    #[arg(long, default_value = "affine", value_parser = ["affine", "mxfp4", "nvfp4", "mxfp8"])]
    pub(crate) q_mode: String,
    /// Mixed-bit recipe, for affine
    #[arg(long, value_parser = ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"])]
    pub(crate) quant_predicate: Option<String>,
    /// Dtype of what is not packed (default: config.json's; float16 for a .gguf file)
    #[arg(long, value_parser = ["float16", "bfloat16", "float32"])]
    pub(crate) dtype: Option<String>,
    /// Write a model without packed weights
    #[arg(short, long)]
    pub(crate) dequantize: bool,
}

/// `export`.
#[derive(Subcommand, Debug)]
pub(crate) enum ExportCommand {
    /// A model, or with --adapter-path an adapter alone, as a file for llama.cpp
    Gguf(ExportGgufArgs),
}

/// `export gguf`.
#[derive(Args, Debug)]
pub(crate) struct ExportGgufArgs {
    /// Model directory or Hugging Face id
    #[arg(long, default_value = "mlx_model")]
    pub(crate) model: String,
    /// Adapter directory: write this adapter as llama.cpp's LoRA, for the file of the model
    #[arg(long)]
    pub(crate) adapter_path: Option<String>,
    /// The file; must not exist
    #[arg(long, value_name = "FILE")]
    pub(crate) out: String,
    /// Type of the matrices; auto keeps each as near as a type of llama.cpp can. An adapter is always f32
    #[arg(long = "type", value_name = "TYPE", default_value = "auto", value_parser = GGUF_TYPES)]
    pub(crate) kind: String,
    /// Report as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `inspect`.
#[derive(Args, Debug)]
pub(crate) struct InspectArgs {
    /// Model or adapter directory, or Hugging Face id
    pub(crate) path: String,
    /// Report as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `doctor`.
#[derive(Args, Debug)]
pub(crate) struct DoctorArgs {
    /// Report as JSON
    #[arg(long)]
    pub(crate) json: bool,
}
