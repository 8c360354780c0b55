//! Flags of the commands that run a model: generate, chat, server, perplexity.

use std::path::PathBuf;

use clap::Args;

/// The data set of `perplexity` when none is named, as in mlx_lm.
pub(crate) const DEFAULT_DATA: &str = "allenai/tulu-3-sft-mixture";

/// XTC's threshold where none is given, in every command of mlx_lm.
pub(crate) const XTC_THRESHOLD: f32 = 0.1;

/// The model that is used when none is named, as in mlx_lm.
const DEFAULT_MODEL: &str = "mlx-community/Llama-3.2-3B-Instruct-4bit";

/// `generate`.
#[derive(Args, Debug)]
pub(crate) struct GenerateArgs {
    /// Model directory or Hugging Face id
    #[arg(long, default_value = DEFAULT_MODEL)]
    pub(crate) model: String,
    /// Adapter directory, applied unfused
    #[arg(long)]
    pub(crate) adapter_path: Option<String>,
    /// More tokens that end the answer
    #[arg(long, num_args = 1.., value_name = "ID|TOKEN")]
    pub(crate) extra_eos_token: Vec<String>,
    /// System prompt
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) system_prompt: Option<String>,
    /// The message; `-` reads it from stdin
    #[arg(short, long, default_value = "hello", allow_hyphen_values = true)]
    pub(crate) prompt: String,
    /// How the answer begins
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) prefill_response: Option<String>,
    /// Most tokens to generate; -1: no limit
    #[arg(short, long, default_value_t = 100)]
    pub(crate) max_tokens: i64,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    /// Cut tokens below min-p times the probability of the best
    #[arg(long, default_value_t = 0.0)]
    pub(crate) min_p: f32,
    /// Keep the k best tokens; 0: all
    #[arg(long, default_value_t = 0)]
    pub(crate) top_k: usize,
    /// min-p keeps at least this many
    #[arg(long, default_value_t = 1)]
    pub(crate) min_tokens_to_keep: usize,
    /// Seed
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Use the prompt as it is, without the chat template
    #[arg(long)]
    pub(crate) ignore_chat_template: bool,
    /// JSON object of further variables for the chat template
    #[arg(long)]
    pub(crate) chat_template_config: Option<String>,
    /// `false` prints the text alone
    #[arg(long, default_value = "true")]
    pub(crate) verbose: String,
}

/// Sampling flags that generate and chat share.
#[derive(Args, Debug)]
pub(crate) struct SamplingArgs {
    /// Temperature; 0: the best token
    #[arg(long, default_value_t = 0.0)]
    pub(crate) temp: f32,
    /// Nucleus
    #[arg(long, default_value_t = 1.0)]
    pub(crate) top_p: f32,
    /// Probability of cutting the best tokens at a step
    #[arg(long, default_value_t = 0.0)]
    pub(crate) xtc_probability: f32,
    /// What is cut then: all but the least probable token above this
    #[arg(long, default_value_t = XTC_THRESHOLD)]
    pub(crate) xtc_threshold: f32,
}

/// `chat`.
#[derive(Args, Debug)]
pub(crate) struct ChatArgs {
    /// Model directory or Hugging Face id
    #[arg(long, default_value = DEFAULT_MODEL)]
    pub(crate) model: String,
    /// Adapter directory, applied unfused
    #[arg(long)]
    pub(crate) adapter_path: Option<String>,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    /// Seed
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Most tokens per answer; -1: no limit
    #[arg(short, long, default_value_t = 256)]
    pub(crate) max_tokens: i64,
    /// System prompt
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) system_prompt: Option<String>,
}

/// `server`.
#[derive(Args, Debug)]
pub(crate) struct ServerArgs {
    /// Model directory or Hugging Face id
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Adapter of the model's own name (mlx_lm's flag)
    #[arg(long)]
    pub(crate) adapter_path: Option<String>,
    /// Address
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) host: String,
    /// Port; 0 takes a free one
    #[arg(long, default_value_t = 8080)]
    pub(crate) port: u16,
    /// Origins whose pages may call, comma separated; `*` is all (mlx_lm's default; here it is none)
    #[arg(long, value_delimiter = ',')]
    pub(crate) allowed_origins: Vec<String>,
    /// Logging level
    #[arg(long, default_value = "INFO", value_parser = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"])]
    pub(crate) log_level: String,
    /// Chat template to use instead of the model's
    #[arg(long, default_value = "")]
    pub(crate) chat_template: String,
    /// Default temperature
    #[arg(long, default_value_t = 0.0)]
    pub(crate) temp: f32,
    /// Default nucleus
    #[arg(long, default_value_t = 1.0)]
    pub(crate) top_p: f32,
    /// Default top-k
    #[arg(long, default_value_t = 0)]
    pub(crate) top_k: usize,
    /// Default min-p
    #[arg(long, default_value_t = 0.0)]
    pub(crate) min_p: f32,
    /// Default for the most tokens to generate
    #[arg(long, default_value_t = 512)]
    pub(crate) max_tokens: usize,
    /// JSON object of further variables for the chat template
    #[arg(long, default_value = "{}")]
    pub(crate) chat_template_args: String,
    /// Requests decoded together
    #[arg(long, default_value_t = 32)]
    pub(crate) decode_concurrency: usize,
    /// An adapter and the model name that selects it; may be repeated
    #[arg(long, value_name = "NAME=DIR", help_heading = "graft's own")]
    pub(crate) adapter: Vec<String>,
    /// Directory of adapters: a request for a model that is not known is answered by the adapter of that name below it
    #[arg(long, value_name = "DIR", help_heading = "graft's own")]
    pub(crate) adapter_root: Option<PathBuf>,
    /// Key that a request to load or unload an adapter must show (default: $GRAFT_ADMIN_KEY; none: such requests are refused)
    #[arg(long, value_name = "KEY", help_heading = "graft's own")]
    pub(crate) admin_key: Option<String>,
    /// Most adapters at a time
    #[arg(long, default_value_t = 64, value_name = "N", help_heading = "graft's own")]
    pub(crate) max_adapters: usize,
    /// Largest rank of an adapter
    #[arg(long, default_value_t = 256, value_name = "N", help_heading = "graft's own")]
    pub(crate) max_adapter_rank: usize,
    /// Memory for adapters, such as 512M or 4G
    #[arg(long, default_value = "4G", value_parser = bytes, value_name = "BYTES", help_heading = "graft's own")]
    pub(crate) adapter_memory: usize,
    /// Memory for keys and values, such as 512M or 4G; requests for which there is none wait (default: half of what is free)
    #[arg(long, value_parser = bytes, value_name = "BYTES", help_heading = "graft's own")]
    pub(crate) kv_memory: Option<usize>,
    /// A key that requests have to show, as `Authorization: Bearer KEY` or `X-Api-Key: KEY`; may be repeated. Others on
    /// this machine see it among the processes: --api-key-file or GRAFT_API_KEY are better
    #[arg(long, value_name = "KEY", help_heading = "graft's own")]
    pub(crate) api_key: Vec<String>,
    /// A file with such keys, one a line; lines that begin with # are none
    #[arg(long, value_name = "FILE", help_heading = "graft's own")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// Names that requests may call this server by, comma separated, beside this machine's own; asked only where it
    /// listens on the loopback and wants no key
    #[arg(long, value_name = "NAMES", value_delimiter = ',', help_heading = "graft's own")]
    pub(crate) allowed_hosts: Vec<String>,
    /// How requests are logged to stderr
    #[arg(long, default_value = "text", value_parser = ["text", "json"], help_heading = "graft's own")]
    pub(crate) log_format: String,
    /// The base's id in /v1/models and in requests (default: --model as given)
    #[arg(long, value_name = "ID", help_heading = "graft's own")]
    pub(crate) model_id: Option<String>,
}

/// `perplexity`.
#[derive(Args, Debug)]
pub(crate) struct PerplexityArgs {
    /// Model directory or Hugging Face id
    #[arg(long)]
    pub(crate) model: String,
    /// Adapter directory, applied unfused
    #[arg(long, help_heading = "graft's own")]
    pub(crate) adapter_path: Option<String>,
    /// Windows per batch
    #[arg(long, default_value_t = 8)]
    pub(crate) batch_size: usize,
    /// Tokens per window
    #[arg(long, default_value_t = 512)]
    pub(crate) sequence_length: usize,
    /// Windows; -1: all
    #[arg(long, default_value_t = 256)]
    pub(crate) num_samples: i64,
    /// A .jsonl file, a directory with test.jsonl, valid.jsonl or train.jsonl, or a Hugging Face data set id
    #[arg(long, default_value = DEFAULT_DATA)]
    pub(crate) data_path: String,
    /// Seed of the order of the rows
    #[arg(long, default_value_t = 123)]
    pub(crate) seed: u64,
    /// Report as JSON
    #[arg(long, help_heading = "graft's own")]
    pub(crate) json: bool,
}

/// A number of bytes, or of K, M, G or T of 1024 each.
fn bytes(text: &str) -> Result<usize, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match text[digits.len()..].to_ascii_uppercase().trim_end_matches('B') {
        "" => 0,
        "K" | "KI" => 10,
        "M" | "MI" => 20,
        "G" | "GI" => 30,
        "T" | "TI" => 40,
        _ => return Err("expected a whole number of bytes, or one with K, M, G or T, such as 512M".into()),
    };
    let number = digits.parse::<usize>().ok().and_then(|n| n.checked_mul(1 << shift));
    number.ok_or_else(|| "expected a whole number of bytes, or one with K, M, G or T, such as 512M".into())
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn sizes_are_read() {
        for (text, expected) in [("0", 0), ("512", 512), ("4K", 4096), ("2MB", 2 << 20), ("1gib", 1 << 30)] {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
        for text in ["", "G", "1.5G", "-1", "4X", "99999999999T"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
