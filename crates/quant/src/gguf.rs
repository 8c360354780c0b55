//! GGUF, llama.cpp's container, read and written: metadata, tensors and the block types that are exactly affine.
//!
//! A file that is read is someone else's, so every length in it is checked against what is left of the file before it is used.
//! Blocks of 32 weights map onto MLX's groups of 32 without loss: `w = scale * code + bias` with
//!
//! | type | block | code | scale | bias |
//! |---|---|---|---|---|
//! | Q4_0 | d, 16 bytes: low nibbles are weights 0..16, high nibbles 16..32 | nibble | d | -8 d |
//! | Q4_1 | d, m, 16 bytes as above | nibble | d | m |
//! | Q8_0 | d, 32 signed bytes | byte + 128 | d | -128 d |
//!
//! d and m are 16-bit floats; a power of two times d is exact unless it overflows, which is an error.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use half::f16;

pub use self::export::{ExportParts, ExportReport, Exported, Placed, export_gguf};
use self::header::Header;
pub use self::writer::{Field, GgufWriter, Planned};
use crate::{Error, Grid, Packed, Result, StoredDtype, Tensor};

mod export;
mod header;
mod pack;
mod writer;

/// Weights in a block of Q4_0, Q4_1 and Q8_0.
const BLOCK: usize = 32;
/// How a file begins.
const MAGIC: &[u8; 4] = b"GGUF";
/// Tensors begin at multiples of this, unless a file says otherwise.
const ALIGNMENT: u64 = 32;

/// A value of the metadata; the widths of the file's number types are not kept.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// An unsigned number of 8 to 64 bits.
    U64(u64),
    /// A signed number of 8 to 64 bits.
    I64(i64),
    /// A float of 32 or 64 bits.
    F64(f64),
    /// A boolean.
    Bool(bool),
    /// Text.
    Str(String),
    /// Values of one type.
    Array(Vec<Value>),
}

impl Value {
    /// The whole number, unless it is negative or none.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::U64(x) => Some(*x),
            Self::I64(x) => u64::try_from(*x).ok(),
            _ => None,
        }
    }

    /// The number, whole or not.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::U64(x) => Some(*x as f64),
            Self::I64(x) => Some(*x as f64),
            Self::F64(x) => Some(*x),
            _ => None,
        }
    }

    /// The boolean.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(x) = self { Some(*x) } else { None }
    }

    /// The text.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::Str(x) = self { Some(x) } else { None }
    }

    /// The values of an array.
    pub fn as_array(&self) -> Option<&[Value]> {
        if let Self::Array(x) = self { Some(x) } else { None }
    }
}

/// How a tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// bfloat16.
    BF16,
    /// 4-bit codes, symmetric.
    Q4_0,
    /// 4-bit codes with a minimum.
    Q4_1,
    /// 8-bit codes, symmetric.
    Q8_0,
    /// Another of ggml's types, by its number.
    Other(u32),
}

/// ggml's types by number: name, weights in a block, bytes of a block. Those without a size have left the format.
const KINDS: [(u32, &str, usize, usize); 32] = [
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", BLOCK, 18),
    (3, "Q4_1", BLOCK, 20),
    (6, "Q5_0", BLOCK, 22),
    (7, "Q5_1", BLOCK, 24),
    (8, "Q8_0", BLOCK, 34),
    (9, "Q8_1", BLOCK, 36),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", BLOCK, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", BLOCK, 17),
];

impl Kind {
    fn from_number(number: u32) -> Self {
        match number {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            8 => Self::Q8_0,
            30 => Self::BF16,
            other => Self::Other(other),
        }
    }

    fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 8,
            Self::BF16 => 30,
            Self::Other(number) => number,
        }
    }

    /// Weights and bytes of a block, where known.
    fn block(self) -> Option<(usize, usize)> {
        KINDS.iter().find(|k| k.0 == self.number()).map(|k| (k.2, k.3))
    }

    /// The type of that name in lower case, if graft writes it.
    pub fn from_name(name: &str) -> Option<Self> {
        let kinds = [Self::F32, Self::F16, Self::BF16, Self::Q4_0, Self::Q4_1, Self::Q8_0];
        kinds.into_iter().find(|kind| kind.to_string().eq_ignore_ascii_case(name))
    }

    /// Bytes of a tensor of this shape; none if its rows are not whole blocks, or the type is not known.
    fn bytes_of(self, shape: &[usize]) -> Option<u64> {
        let (weights, bytes) = self.block()?;
        let whole = shape.last().copied().unwrap_or(1).is_multiple_of(weights);
        let total = shape.iter().try_fold(1_usize, |product, &dim| product.checked_mul(dim))?;
        Some((total / weights).checked_mul(bytes)? as u64).filter(|_| whole)
    }

    /// llama.cpp's number of a file that is mostly of this type.
    fn file_type(self) -> u32 {
        match self {
            Self::Q8_0 => 7,
            Self::BF16 => 32,
            other => other.number(),
        }
    }

    /// The grid of the block types that are exactly affine.
    pub fn grid(self) -> Option<Grid> {
        match self {
            Self::Q4_0 | Self::Q4_1 => Some(Grid::affine(4, BLOCK as i32)),
            Self::Q8_0 => Some(Grid::affine(8, BLOCK as i32)),
            _ => None,
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match KINDS.iter().find(|k| k.0 == self.number()) {
            Some(kind) => f.write_str(kind.1),
            None => write!(f, "type {}", self.number()),
        }
    }
}

/// Where a tensor is and what it is.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// llama.cpp's name.
    pub name: String,
    /// Dimensions, row-major: (out, in) for a linear. The file has them the other way round.
    pub shape: Vec<usize>,
    /// How it is stored.
    pub kind: Kind,
    /// Where its bytes begin in the file.
    pub offset: u64,
    /// How many they are; 0 for a type whose size is not known, which cannot be read.
    pub bytes: u64,
}

/// A packed tensor on the host, ready to be written or to become a [`crate::Packed`].
#[derive(Debug, Clone, PartialEq)]
pub struct HostPacked {
    /// u32 (out, words), MLX's order: code i of a row in bits `[i b, (i + 1) b)` of its bytes.
    pub codes: Tensor,
    /// (out, groups): f16 of a GGUF file, else any float type, or u8 in the modes of floats.
    pub scales: Tensor,
    /// As `scales`; only the affine mode has them.
    pub biases: Option<Tensor>,
    /// How it is packed.
    pub grid: Grid,
}

impl HostPacked {
    /// The same as arrays.
    ///
    /// # Errors
    /// When MLX has no such type.
    pub fn to_arrays(&self) -> Result<Packed> {
        let biases = self.biases.as_ref().map(Tensor::to_array).transpose()?;
        Ok(Packed { codes: self.codes.to_array()?, scales: self.scales.to_array()?, biases, grid: self.grid })
    }
}

/// What a tensor holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Block {
    /// Q4_0, Q4_1 and Q8_0, exactly.
    Packed(HostPacked),
    /// F32, F16 and BF16, as they are.
    Dense(Tensor),
}

/// An open file: its header in memory, its tensors on disk.
#[derive(Debug)]
pub struct Gguf {
    /// Metadata by key.
    pub metadata: BTreeMap<String, Value>,
    /// Tensors by name.
    pub tensors: BTreeMap<String, TensorInfo>,
    path: PathBuf,
    file: File,
}

impl Gguf {
    /// Reads the header of a file of version 2 or 3.
    ///
    /// # Errors
    /// When the file cannot be read, is no GGUF file, or says what cannot be true.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        let length = file.metadata().map_err(Error::io(path))?.len();
        let handle = file.try_clone().map_err(Error::io(path))?;
        let mut header = Header::new(path, handle, length);
        let magic = header.array::<4>("the word GGUF")?;
        if magic != *MAGIC {
            let what = format!("a file that begins with \"{}\", not with \"GGUF\",", magic.escape_ascii());
            let hint = "give a GGUF file or a model directory".to_owned();
            return Err(Error::Unsupported { file: path.to_path_buf(), what, hint });
        }
        let version = header.u32("version")?;
        if !(2..=3).contains(&version) {
            let what = if (1..=3).contains(&version.swap_bytes()) {
                format!("GGUF version {} in big-endian order", version.swap_bytes())
            } else {
                format!("GGUF version {version}")
            };
            let hint = "versions 2 and 3 in little-endian order are".to_owned();
            return Err(Error::Unsupported { file: path.to_path_buf(), what, hint });
        }
        let tensor_count = header.u64("tensor_count")?;
        let value_count = header.u64("metadata_kv_count")?;
        let mut metadata = BTreeMap::new();
        for i in 0..value_count {
            let key = header.string(&format!("key {i} of {value_count}"))?;
            let kind = header.u32(&key)?;
            let value = header.value(kind, &key, 0)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(header.damaged(format!("the key {key} stands twice")));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => ALIGNMENT,
            Some(value) => {
                value.as_u64().filter(|a| a.is_power_of_two() && *a <= 1 << 20).ok_or_else(|| {
                    header.damaged(format!("general.alignment: expected a power of two, found {value:?}"))
                })?
            }
        };
        let mut infos = Vec::new();
        for i in 0..tensor_count {
            infos.push(header.tensor(i, tensor_count)?);
        }
        let start = header.position().next_multiple_of(alignment);
        let mut tensors = BTreeMap::new();
        for mut info in infos {
            let name = info.name.clone();
            let (begin, bytes) = (start.saturating_add(info.offset), info.bytes);
            if !info.offset.is_multiple_of(alignment) || begin.saturating_add(bytes) > length {
                let what = format!("tensor {name}: {bytes} bytes at byte {begin} of a file of {length}");
                return Err(header.damaged(what));
            }
            info.offset += start;
            if tensors.insert(name.clone(), info).is_some() {
                return Err(header.damaged(format!("tensor {name} stands twice")));
            }
        }
        Ok(Self { metadata, tensors, path: path.to_path_buf(), file })
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads a tensor; with `rows`, row i of the result is row `rows[i]` of the file.
    ///
    /// (llama.cpp stores the rows of some families' q and k in another order than Hugging Face.)
    ///
    /// # Errors
    /// When its type is none of ours, when a scale is not finite or a bias overflows 16 bits, or when `rows` does
    /// not fit.
    pub fn read(&self, info: &TensorInfo, rows: Option<&[usize]>) -> Result<Block> {
        let (weights, bytes) = self.readable(info)?;
        let length = usize::try_from(info.bytes)
            .map_err(|_| self.tensor_error(info, &"a tensor that fits into memory", &info.bytes))?;
        let mut data = vec![0; length];
        self.file.read_exact_at(&mut data, info.offset).map_err(Error::io(&self.path))?;
        let inputs = info.shape.last().copied().unwrap_or(1);
        // The rows of a vector are its elements.
        let row_bytes = if info.shape.len() == 1 { bytes } else { inputs / weights * bytes };
        if let Some(rows) = rows {
            data = in_order(&data, rows, row_bytes)
                .map_err(|(expected, found)| self.tensor_error(info, &expected, &found))?;
        }
        if let Some(grid) = info.kind.grid() {
            return self.unpack(info, grid, &data, bytes).map(Block::Packed);
        }
        let dtype = match info.kind {
            Kind::F16 => StoredDtype::F16,
            Kind::BF16 => StoredDtype::BF16,
            _ => StoredDtype::F32,
        };
        Ok(Block::Dense(Tensor { dtype, shape: info.shape.clone(), data }))
    }

    /// Weights and bytes of a block, if the tensor's type is one of ours.
    pub(crate) fn readable(&self, info: &TensorInfo) -> Result<(usize, usize)> {
        let block = info.kind.block().filter(|_| !matches!(info.kind, Kind::Other(_)));
        block.ok_or_else(|| Error::Unsupported {
            file: self.path.clone(),
            what: format!("tensor {} of type {}", info.name, info.kind),
            hint: "F32, F16, BF16, Q4_0, Q4_1 and Q8_0 are; make the file again with one of these types \
                   (llama-quantize --pure keeps to one)"
                .to_owned(),
        })
    }

    /// Blocks to codes, scales and biases.
    fn unpack(&self, info: &TensorInfo, grid: Grid, data: &[u8], block: usize) -> Result<HostPacked> {
        let blocks = data.len() / block;
        let mut codes = Vec::with_capacity(blocks * BLOCK * grid.bits as usize / 8);
        let mut scales = Vec::with_capacity(blocks * 2);
        let mut biases = Vec::with_capacity(blocks * 2);
        for block in data.chunks_exact(block) {
            let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]);
            let d = half(0);
            let bias = match info.kind {
                Kind::Q4_1 => half(2),
                Kind::Q4_0 => f16::from_f32(-8.0 * d.to_f32()),
                _ => f16::from_f32(-128.0 * d.to_f32()),
            };
            if !d.is_finite() || !bias.is_finite() {
                let found = format!("a block with scale {d} and bias {bias}");
                return Err(self.tensor_error(info, &"finite scales and biases", &found));
            }
            match info.kind {
                Kind::Q8_0 => codes.extend(block[2..].iter().map(|code| code ^ 0x80)),
                Kind::Q4_1 => pack_nibbles(&block[4..], &mut codes),
                _ => pack_nibbles(&block[2..], &mut codes),
            }
            scales.extend(d.to_le_bytes());
            biases.extend(bias.to_le_bytes());
        }
        let inputs = info.shape.last().copied().unwrap_or(0);
        let shaped = |last: usize| {
            let mut shape = info.shape.clone();
            shape.pop();
            shape.push(last);
            shape
        };
        let (words, groups) = (shaped(grid.words(inputs)), shaped(grid.groups(inputs)));
        Ok(HostPacked {
            codes: Tensor { dtype: StoredDtype::U32, shape: words, data: codes },
            scales: Tensor { dtype: StoredDtype::F16, shape: groups.clone(), data: scales },
            biases: Some(Tensor { dtype: StoredDtype::F16, shape: groups, data: biases }),
            grid,
        })
    }

    fn tensor_error(&self, info: &TensorInfo, expected: &dyn ToString, found: &dyn ToString) -> Error {
        Error::Tensor {
            file: self.path.clone(),
            name: info.name.clone(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }
}

/// The rows of `data` in the order asked for, or what was expected and found instead.
fn in_order(data: &[u8], rows: &[usize], row_bytes: usize) -> std::result::Result<Vec<u8>, (String, String)> {
    let count = data.len().checked_div(row_bytes).unwrap_or(0);
    let mut seen = vec![false; count];
    let mut out = Vec::with_capacity(data.len());
    for &row in rows {
        if row >= count || std::mem::replace(&mut seen[row], true) {
            return Err(("each row once".into(), format!("row {row} of {count}")));
        }
        out.extend_from_slice(&data[row * row_bytes..(row + 1) * row_bytes]);
    }
    if rows.len() == count { Ok(out) } else { Err((format!("{count} rows"), rows.len().to_string())) }
}

/// 16 bytes with weights 0..16 in the low and 16..32 in the high nibbles, to 16 bytes with two neighbours each.
fn pack_nibbles(block: &[u8], codes: &mut Vec<u8>) {
    let (pairs, _) = block.as_chunks::<2>();
    codes.extend(pairs.iter().map(|[a, b]| (a & 0x0f) | (b << 4)));
    codes.extend(pairs.iter().map(|[a, b]| (a >> 4) | (b & 0xf0)));
}
