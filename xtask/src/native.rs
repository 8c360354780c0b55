//! The native half of mlx-sys on Linux, whose own build script knows only macOS.
//!
//! libmlx.so and the C++ headers come from the wheel `mlx-cpu`; libmlxc.a is compiled from the C++ sources inside the
//! crates.io package mlx-sys; bindings.rs is made by bindgen with mlx-sys' own settings.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};

use crate::cache::{self, Wheel};
use crate::{elf, sh};

/// The version of MLX that mlx-sys 0.7.0 is written against.
pub(crate) const MLX: Wheel = Wheel {
    name: "mlx-cpu",
    version: "0.32.2",
    sha256: &[
        // manylinux_2_35_x86_64, manylinux_2_35_aarch64
        "fc5d31b90fc4f457b2f9614ed45651a567d22a6a11a03d114a90a4e10bdd8878",
        "d0f94625588b51a878786dd51cec5617894ce586cf3c94645ce1b64e24c27c0b",
    ],
};

const LIBCLANG: Wheel = Wheel {
    name: "libclang",
    version: "18.1.1",
    sha256: &[
        // manylinux2010_x86_64, manylinux2014_aarch64
        "c533091d8a3bbf7460a00cb6c1a71da93bffe148f172c7d03b1c31fbf8aa2a0b",
        "54dda940a4a0491a9d1532bf071ea3ef26e6dbaf03b5000ed94dd7174e8f9592",
    ],
};

/// Sources of ours that go into the result: (file name, text).
const SHIMS: [(&str, &str); 3] = [
    ("half.h", include_str!("../native/half.h")),
    ("prelude.h", include_str!("../native/prelude.h")),
    ("mach_time.cpp", include_str!("../native/mach_time.cpp")),
];

const CXX_FLAGS: [&str; 5] = ["-std=c++20", "-O2", "-fPIC", "-w", "-c"];

/// Raised when what is done here changes and nothing of what goes into [`key`] does.
const RECIPE: u32 = 1;

/// What a build needs to know.
pub(crate) struct Native {
    /// libmlxc.a, libmlx.so, bindings.rs.
    pub(crate) lib: PathBuf,
    /// Directories of C++ headers: MLX's, then mlx-c's.
    pub(crate) include: [PathBuf; 2],
}

/// Gets everything, or finds it in the cache.
pub(crate) fn get() -> Result<Native> {
    let sys = mlx_sys()?;
    let mlx_c = sys.dir.join("src/mlx-c");
    let cxx = compiler();
    let name = format!("mlx-{}-sys-{}-{:016x}", MLX.version, sys.version, key(&sys, cxx.as_deref()));
    let wheel = mlx()?;
    let include = [wheel.join("mlx/include"), mlx_c.clone()];
    let lib = cache::dir(&name, |temporary| {
        let cxx = cxx.context(
            "no C++ compiler was found: install one with `sudo apt-get install g++` (Debian, Ubuntu) or \
             `sudo dnf install gcc-c++` (Fedora), or name yours in CXX",
        )?;
        for (name, text) in SHIMS {
            fs::write(temporary.join(name), text)?;
        }
        let clang = cache::wheel(&LIBCLANG, |_| Ok(()))?;
        eprintln!("making the bindings of mlx-c");
        bindings(&clang, &cxx, &mlx_c, temporary)?;
        eprintln!("compiling mlx-c");
        compile(&cxx, &include, &mlx_c, temporary)?;
        // A linker script: what `-lmlx` finds would be recorded by its name alone, what INPUT names by its path.
        Ok(fs::write(temporary.join("libmlx.so"), format!("INPUT(\"{}\")\n", wheel.join(LIBMLX).display()))?)
    })?;
    Ok(Native { lib, include })
}

struct MlxSys {
    dir: PathBuf,
    version: String,
}

/// The mlx-sys that Cargo.lock names.
fn mlx_sys() -> Result<MlxSys> {
    let metadata = sh::metadata()?;
    let mut packages = metadata["packages"].as_array().into_iter().flatten();
    let package =
        packages.find(|package| package["name"] == "mlx-sys").context("no crate depends on mlx-sys")?;
    let manifest = package["manifest_path"].as_str().context("mlx-sys has no manifest path")?;
    Ok(MlxSys {
        dir: Path::new(manifest).parent().context("mlx-sys has no directory")?.to_path_buf(),
        version: package["version"].as_str().unwrap_or_default().to_owned(),
    })
}

/// `CXX`, or the first C++ compiler there is.
fn compiler() -> Option<String> {
    let named = std::env::var("CXX").ok().filter(|name| !name.is_empty());
    let mut names = named.into_iter().chain(["c++", "g++", "clang++"].map(str::to_owned));
    names.find(|name| sh::works(Command::new(name).arg("--version")))
}

/// All that decides the result, in 64 bits (FNV-1a).
fn key(sys: &MlxSys, cxx: Option<&str>) -> u64 {
    let compiler = cxx.and_then(|cxx| sh::output(Command::new(cxx).arg("--version")).ok());
    let mut parts = vec![RECIPE.to_string(), sys.dir.display().to_string(), compiler.unwrap_or_default()];
    parts.extend(MLX.sha256.iter().chain(LIBCLANG.sha256).map(|hash| (*hash).to_owned()));
    parts.extend(CXX_FLAGS.iter().chain(&SHIMS.map(|shim| shim.1)).map(|text| (*text).to_owned()));
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// libmlxc.a, one compiler per processor.
fn compile(cxx: &str, include: &[PathBuf; 2], mlx_c: &Path, out: &Path) -> Result<()> {
    let mut sources = sources(mlx_c, "cpp")?;
    // The largest first, or the last one keeps a single processor busy at the end.
    sources.sort_by_key(|path| std::cmp::Reverse(fs::metadata(path).map_or(0, |data| data.len())));
    sources.push(out.join("mach_time.cpp"));
    let names = sources.iter().filter_map(|path| path.file_stem()?.to_str());
    let objects: Vec<String> = names.map(|name| format!("{name}.o")).collect();
    let queue = Mutex::new(sources.into_iter().zip(&objects).collect::<VecDeque<_>>());
    let work = || -> Result<()> {
        loop {
            let Some((source, object)) = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
            else {
                return Ok(());
            };
            let mut command = Command::new(cxx);
            command.args(CXX_FLAGS).arg("-I").arg(out);
            for dir in include {
                command.arg("-I").arg(dir);
            }
            command.arg("-include").arg(out.join("prelude.h")).arg(source).arg("-o").arg(out.join(object));
            let made =
                sh::output(&mut command).context("mlx-c does not compile (it needs C++20: gcc 11, clang 14)");
            if made.is_err() {
                queue.lock().unwrap_or_else(PoisonError::into_inner).clear();
                return made.map(drop);
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    sh::output(Command::new("ar").args(["crs", "libmlxc.a"]).args(&objects).current_dir(out))
        .context("cannot make libmlxc.a (ar comes with binutils)")?;
    for object in &objects {
        fs::remove_file(out.join(object))?;
    }
    Ok(())
}

/// The wheel, its libmlx.so made such that programs linked against it find it by its path (see [`elf`]).
fn mlx() -> Result<PathBuf> {
    cache::wheel(&MLX, |dir| {
        let path = dir.join(LIBMLX);
        let mut library = fs::read(&path).with_context(|| format!("the mlx-cpu wheel has no {LIBMLX}"))?;
        elf::remove_soname(&mut library).context(LIBMLX)?;
        Ok(fs::write(path, library)?)
    })
}

const LIBMLX: &str = "mlx/lib/libmlx.so";

/// The hidden task that makes the bindings: `<mlx-c> <shims> <builtin headers> <out>`.
pub(crate) const BINDINGS_TASK: &str = "internal-bindings";

/// Starts ourselves again, since libclang is found through an environment variable.
fn bindings(clang: &Path, cxx: &str, mlx_c: &Path, out: &Path) -> Result<()> {
    let native = clang.join("libclang-18.1.1.data/platlib/clang/native");
    ensure!(native.join("libclang.so").exists(), "the libclang wheel has no {}", native.display());
    // The wheel holds no builtin headers (stddef.h, stdint.h): the compiler's own serve.
    let builtin = sh::output(Command::new(cxx).arg("-print-file-name=include"))?;
    let me = std::env::current_exe().context("cannot find this program")?;
    let mut command = Command::new(me);
    command.arg(BINDINGS_TASK).arg(mlx_c).arg(out).arg(builtin.trim()).arg(out.join("bindings.rs"));
    sh::output(command.env("LIBCLANG_PATH", native)).map(drop)
}

pub(crate) fn bindings_task(args: &[String]) -> Result<()> {
    let [mlx_c, shims, builtin, out] = args else {
        bail!("{BINDINGS_TASK} is run by setup alone");
    };
    // As mlx-sys 0.7.0's bindgen_config.rs does, with our half.h ahead of mlx-c's.
    let headers = sources(Path::new(mlx_c), "h")?;
    let builder = bindgen::Builder::default()
        .rust_target("1.73.0".parse().context("bindgen does not know Rust 1.73")?)
        .clang_args(["-I", mlx_c, "-include", &format!("{shims}/half.h"), "-idirafter", builtin])
        .blocklist_function("malloc")
        .blocklist_function("realloc")
        .formatter(bindgen::Formatter::None);
    let builder = headers.iter().fold(builder, |builder, header| builder.header(header.to_string_lossy()));
    builder.generate().context("cannot make the bindings of mlx-c")?.write_to_file(out)?;
    Ok(())
}

/// The files of mlx-c with this extension, sorted.
fn sources(mlx_c: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let dir = mlx_c.join("mlx/c");
    let entries = fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.retain(|path| path.extension().is_some_and(|found| found == extension));
    files.sort();
    Ok(files)
}
