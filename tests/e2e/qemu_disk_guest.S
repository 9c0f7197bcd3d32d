# A guest that is all of its firmware, and writes numbered records to its first IDE disk.
#
# Record n goes to one of 64 places, each in another 64 KiB of the disk. Before it is written, the place has to hold record n - 64,
# in its first and its last words. Once it is written, the low byte of its number is said on the debug console.
.code16
.globl _start
_start:
    cli
    lgdtl %cs:gdtr
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $8, $0xf0000 + protected
.code32
protected:
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $0x90000, %esp
    cld
    # 8 MiB of memory that has to be sent, too.
    movl $0x400000, %edi
    movl $2048, %ecx
1:  movl %edi, (%edi)
    addl $4096, %edi
    loop 1b
    # The disk interrupts nobody.
    movw $0x3f6, %dx
    movb $2, %al
    outb %al, %dx
    xorl %ebx, %ebx
beat:
    incl %ebx
    # 128 sectors are 64 KiB; the first record goes 1 MiB behind the beginning.
    movl %ebx, %ebp
    andl $63, %ebp
    imull $129, %ebp, %ebp
    addl $2048, %ebp
    movb $0x20, %cl
    call command
    movl $0x300000, %edi
    movl $256, %ecx
    movw $0x1f0, %dx
    rep insw
    movl %ebx, %edx
    subl $64, %edx
    jns 1f
    xorl %edx, %edx
1:  cmpl %edx, 0x300000
    jne broken
    cmpl %edx, 0x3001fc
    jne broken
    movl %ebx, %eax
    movl $0x300000, %edi
    movl $128, %ecx
    rep stosl
    movb $0x30, %cl
    call command
    movl $0x300000, %esi
    movl $256, %ecx
    movw $0x1f0, %dx
    rep outsw
    call ready
    movb %bl, %al
    outb %al, $0xe9
    rdtsc
    movl %eax, %esi
2:  pause
    rdtsc
    subl %esi, %eax
    cmpl $2000000, %eax
    jb 2b
    jmp beat
broken:
    hlt
    jmp broken

# Waits until the disk is not busy, and has not failed.
ready:
    movw $0x1f7, %dx
1:  inb %dx, %al
    testb $0x80, %al
    jnz 1b
    testb $0x21, %al
    jnz broken
    ret

# Gives the disk the command in %cl for the one sector in %ebp, and waits for its data.
command:
    call ready
    movw $0x1f6, %dx
    movl %ebp, %eax
    shrl $24, %eax
    andb $0x0f, %al
    orb $0xe0, %al
    outb %al, %dx
    movw $0x1f2, %dx
    movb $1, %al
    outb %al, %dx
    incw %dx
    movl %ebp, %eax
    outb %al, %dx
    incw %dx
    shrl $8, %eax
    outb %al, %dx
    incw %dx
    shrl $8, %eax
    outb %al, %dx
    movw $0x1f7, %dx
    movb %cl, %al
    outb %al, %dx
1:  call ready
    testb $0x08, %al
    jz 1b
    ret
.balign 8
gdt: .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdtr: .word 23
    .long 0xf0000 + gdt
.org 0xfff0
.code16
    ljmp $0xf000, $_start
.org 0xfffe
    .word 0
