# shellcheck shell=bash
# What the emulated host is made of: a distribution's kernel, an initramfs with a small userland, a disk.
# Sourced by scripts/lab, after common.sh. Everything here works without root.
# shellcheck source=common.sh disable=SC2154

# Where the kernel and busybox are kept, for all labs of this user.
downloads=${XDG_CACHE_HOME:-$HOME/.cache}/catnap-lab/packages
! bundled || downloads=$root/lab

# What the host needs beyond its kernel. One that is not there is built in, as some are in Ubuntu's. By crc32c-intel a
# block of the filesystem's journal costs what it costs on real hosts, which have it too, and not twenty times that.
modules="kvm-amd virtio_pci virtio_blk virtio_net tun crc32c-intel"

# Host programs that people and tests want inside. The last ones only when they are there.
programs="qemu-img mke2fs e2fsck"
programs_wanted="curl strace tar zstd"

# With an older QEMU (7.2, Debian 12's, was tried) emulated hosts with guests of their own ended in a triple fault now and
# then, within minutes when four vCPUs are busy; that was before it was mended.
emulator_least=10
# Where the lab's own is kept: a newer one, when the installed one is too old and the distribution has another in its
# backports, and otherwise a copy, for it is mended.
emulator=${XDG_CACHE_HOME:-$HOME/.cache}/catnap-lab/qemu

# qemu OPTION…: the emulator, in place of this process.
qemu() {
    ! bundled || exec qemu-system-x86_64 "$@"
    exec "$emulator/usr/bin/qemu-system-x86_64" -L "$emulator/usr/share/qemu" -L "$emulator/usr/share/seabios" "$@"
}

# What it is, for people: ` (QEMU 10.0.2, mended)`.
emulator_version() {
    local mended=''
    [ ! -e "$emulator/mended" ] || mended=', mended'
    (qemu --version) | sed -n "s/.*version \([^ ]*\).*/ (QEMU \1$mended)/p"
}

# Sees to it that the emulator is there, that it is no older than it must be, where that can be had, and mended. The old
# one does, but not always.
fetch_emulator() {
    local version source
    # A bundle was packed with all of that.
    ! bundled || return 0
    source="mended twice $(stat -L -c '%n %s %Y' "$(command -v qemu-system-x86_64)")"
    ! emulator_is "$source" || return 0
    mkdir -p "${emulator%/*}"
    (
        flock 8
        ! emulator_is "$source" || exit 0
        rm -rf "$emulator.new"
        version=$(qemu-system-x86_64 --version | sed -n 's/.*version \([0-9]*\).*/\1/p')
        if [ "${version:-0}" -ge $emulator_least ]; then
            copy_emulator
        elif ! download_emulator; then
            say "the lab works with QEMU $version, whose emulated hosts crash now and then
try: a QEMU of version $emulator_least or newer"
            copy_emulator
        fi
        mend_emulator "$emulator.new/usr/bin/qemu-system-x86_64" && touch "$emulator.new/mended"
        echo "$source" >"$emulator.new/complete"
        rm -rf "$emulator" && mv "$emulator.new" "$emulator"
    ) 8>"$emulator.lock"
}

# emulator_is SOURCE: whether it was made from that.
emulator_is() { [ "$(cat "$emulator/complete" 2>/dev/null)" = "$1" ]; }

# A copy of the installed one. What else it needs it looks for beside the folder that it is in.
copy_emulator() {
    local program folder
    program=$(readlink -f "$(command -v qemu-system-x86_64)")
    rm -rf "$emulator.new"
    mkdir -p "$emulator.new/usr/bin"
    cp "$program" "$emulator.new/usr/bin/qemu-system-x86_64"
    for folder in lib lib64 libexec share; do
        [ ! -d "${program%/*/*}/$folder" ] || ln -s "${program%/*/*}/$folder" "$emulator.new/usr/"
    done
}

# mend_emulator FILE: two stores of QEMU are made to do nothing, if each is found exactly once. Emulated hosts with guests of
# their own have these faults up to 10.0 at least: a guest's triple fault, a CPU that stands still, a host that restarts.
#
# - VMRUN (target/i386/tcg/system/svm_helper.c, helper_vmrun) delivers an interrupt that the host injects, and leaves its
#   vector in exception_index, where it is an exception that waits to be delivered. Mostly nobody looks there before the
#   guest exits again; but when QEMU's own loop is left in between, because a timer of QEMU's rings or another vCPU wants
#   something, the guest gets the vector once more, whether its interrupts are off or not, as an exception. So a handler is
#   interrupted by itself and waits for its own lock, or the stack is not what it should be. It was found in a snapshot of
#   a guest that stood still.
# - Whichever CPU loads the state of its FPU clears a flag in hflags2 of the *first* one (fpu_helper.c, cpu_clear_ignne),
#   which changes the same word at that time and is not asked: its VMRUN or VMEXIT is undone in part. A guest then runs
#   without nested paging, and takes the host's memory for its page tables; a host that runs with it takes a guest's. It
#   was found with a log of who writes the word. The flag (IGNNE#) is for 16-bit systems only; no kernel here sets it.
mend_emulator() {
    # mov %esi, exception_index; movl $0, exception_is_int; movq $-1, exception_next_eip: the first becomes a NOP.
    # andl $~IGNNE, hflags2(%rax); add $8, %rsp: the same. With `lock` in front it would be another one.
    command -v perl >/dev/null && LC_ALL=C perl -0777 -pe '
        $vector = s/\x89\xb3...\xff(?=\xc7\x83....\0\0\0\0\x48\xc7\x83....\xff\xff\xff\xff)/\x66\x0f\x1f\x44\0\0/sg;
        $flag = s/(?<!\xf0)\x81\xa0..\0\0\x7f\xff\xff\xff(?=\x48\x83\xc4\x08)/\x66\x2e\x0f\x1f\x84\0\0\0\0\0/sg;
        END { $? = $vector != 1 || $flag != 1 }' "$1" >"$1.mended" && chmod 755 "$1.mended" && mv "$1.mended" "$1" && return
    rm -f "$1.mended"
    say "the lab's QEMU is not one that can be mended: an emulated host or guest may stand still now and then"
    return 1
}

# From the backports of this release, with lists of their own: the system's settings stay as they are. Its libraries
# are those that the installed QEMU has, or it is not taken.
download_emulator() {
    local release uri new=$emulator.new package packages=()
    command -v apt-get >/dev/null || return
    # shellcheck source=/dev/null
    release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    # shellcheck disable=SC2016 # apt expands it
    uri=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME)' | awk -v release="$release" '$2 == release { print $1; exit }')
    [ -n "$release" ] && [ -n "$uri" ] || return
    say "fetching a newer QEMU from $release-backports"
    mkdir -p "$new/lists/partial" "$new/cache" &&
        echo "deb $uri $release-backports main" >"$new/sources" || return
    local apt=(apt-get -qq -o "Dir::Etc::sourcelist=$new/sources" -o Dir::Etc::sourceparts=/dev/null
        -o "Dir::State::lists=$new/lists" -o "Dir::Cache=$new/cache")
    for package in qemu-system-{x86,common,data} seabios; do packages+=("$package/$release-backports"); done
    (
        cd "$new" && "${apt[@]}" update && "${apt[@]}" download "${packages[@]}" &&
            for package in ./*.deb; do dpkg -x "$package" . || exit; done &&
            ! ldd usr/bin/qemu-system-x86_64 | grep 'not found' >&2 &&
            rm -rf ./*.deb lists cache sources
    ) 2> >({ grep -v unsandboxed || true; } >&2)
}

# Downloads and unpacks the kernel and busybox, unless that has been done. Two labs may begin at once.
fetch_packages() {
    [ -e "$downloads/complete" ] && return
    command -v apt-get >/dev/null ||
        die 5 "the lab takes its kernel from Debian's or Ubuntu's packages, and apt-get is missing"
    mkdir -p "${downloads%/*}"
    (
        flock 8
        [ -e "$downloads/complete" ] || { download && unpack; }
    ) 8>"$downloads.lock" || die 5 "the lab's packages could not be fetched
try: sudo apt-get update, and look at what apt-get says above"
}

# Leaves the packages in packages.new. Lists of packages may be missing or stale, hence the second try.
download() {
    rm -rf "$downloads.new"
    mkdir -p "$downloads.new"
    download_once || { as_root apt-get update -qq >&2 && download_once; }
}

download_once() {
    local image names
    image=$(kernel_package) || return
    names=("$image" busybox-static)
    # Ubuntu keeps the modules in a package of their own.
    if [[ $image = *-generic ]]; then names+=("${image/image/modules}"); fi
    say "fetching ${names[*]}"
    # apt warns that it works as root in a folder of this user; it does that well.
    (cd "$downloads.new" && apt-get download -qq "${names[@]}" 2> >({ grep -v unsandboxed || true; } >&2))
}

# Each step only after the one before: a half unpacked kernel must not look complete.
unpack() {
    (
        cd "$downloads.new" &&
            for package in ./*.deb; do dpkg -x "$package" tree || exit; done &&
            # Where a distribution keeps everything in /usr, this makes the two layouts one.
            { [ -d tree/lib ] || ln -s usr/lib tree/lib; } &&
            # Newer kernels come with compressed modules, which insmod of busybox does not read.
            find tree -name '*.ko.xz' -exec xz -d {} + &&
            find tree -name '*.ko.zst' -exec zstd -q -d --rm {} + &&
            mv "$(find tree -path '*bin/busybox')" busybox &&
            mv tree/boot/vmlinuz-* vmlinuz &&
            ./busybox depmod -b tree "$(ls tree/lib/modules)" &&
            rm ./*.deb &&
            touch complete
    ) && rm -rf "$downloads" && mv "$downloads.new" "$downloads"
}

# The package that the distribution's name for its smallest kernel stands for today.
kernel_package() {
    local name
    for name in linux-image-cloud-amd64 linux-image-virtual; do
        apt-cache depends "$name" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | grep . && return
    done
    return 1
}

# make_initramfs AGENT OUT: the whole userland of the host, as an archive that the kernel unpacks into RAM.
# Not compressed: unpacking costs more under emulation than reading does.
make_initramfs() {
    local agent=$1 out=$2 tree name
    tree=$(mktemp -d "$out.XXXXXX")
    chmod 755 "$tree"
    mkdir -p "$tree"/{bin,sbin,etc,lib/modules,proc,sys,dev,tmp,run,root,usr/bin,usr/sbin,lab}
    cp "$downloads/busybox" "$tree/bin/"
    for name in $("$downloads/busybox" --list); do
        [ "$name" = busybox ] || ln -s /bin/busybox "$tree/bin/$name"
    done
    ln -s bin/busybox "$tree/init"
    cp -r "$root"/scripts/lib/lab-root/. "$tree/"
    cp "$agent" "$tree/bin/catnap-guest"
    copy_modules "$tree/lib/modules"
    for name in $programs; do copy_program "$name" "$tree"; done
    for name in $programs_wanted; do command -v "$name" >/dev/null && copy_program "$name" "$tree"; done
    # cpio tells how much it wrote, which nobody wants to know unless it failed.
    (cd "$tree" && find . | "$downloads/busybox" cpio -o -H newc -R 0:0) >"$out" 2>"$out.log" ||
        die 1 "the lab's initramfs cannot be made: $(cat "$out.log")"
    rm -rf "$tree"
}

# Copies the modules, with numbers in front that give the order in which to load them: modules.dep names
# what a module needs, what must come first last.
copy_modules() {
    local folder number=10 name module
    folder=$(echo "$downloads"/tree/lib/modules/*)
    for module in $(
        for name in $modules; do
            grep -m 1 "/$name.ko:" "$folder/modules.dep" | tr -d : | xargs -n 1 | tac
        done | awk '!seen[$0]++'
    ); do
        cp "$folder/$module" "$1/$((number++))-${module##*/}"
    done
}

# Copies a program and the libraries that it is linked with to where the dynamic loader looks for them.
copy_program() {
    local program file
    program=$(command -v "$1")
    rm -f "$2/bin/$1"
    for file in "$program" $(ldd "$program" | grep -o '/[^ ]*'); do
        mkdir -p "$2${file%/*}"
        [ -e "$2$file" ] || cp -L "$file" "$2$file"
    done
}

# make_disk FILE: an empty filesystem that grows as it is filled.
make_disk() {
    truncate -s 16G "$1.new"
    mke2fs -q -t ext4 -L lab -m 0 -E lazy_itable_init=1,lazy_journal_init=1,nodiscard "$1.new"
    mv "$1.new" "$1"
}
